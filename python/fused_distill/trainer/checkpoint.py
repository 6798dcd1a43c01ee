"""Checkpoints that appear complete or not at all, even if the process is killed or the disk is full."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .atomic import replace_folder
from .config import ConfigError, TrainConfig, resume_fingerprint
from .sources import differences

# It warns at every checkpoint that tied weights are saved once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

SETTINGS = "settings.json"  # the settings and fingerprints that must match on resume


def save_checkpoint(
    accelerator: Accelerator, config: TrainConfig, sources: dict[str, str | None], step: int
) -> None:
    """Save accelerate's state atomically (temporary folder, then rename), then prune old checkpoints.

    Raises:
        OSError: it cannot be saved; earlier checkpoints are kept.
    """
    folder = config.output / "checkpoints"
    scratch = folder / "unfinished"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / SETTINGS).write_text(json.dumps(resume_fingerprint(config) | sources))
        accelerator.wait_for_everyone()
        accelerator.save_state(str(scratch))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_folder(scratch, folder / f"step-{step:08}")
    except Exception as error:  # every serialisation library raises its own type
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} cannot be saved to {folder}: {error}") from error
    if accelerator.is_main_process:
        for old in list_checkpoints(config.output)[: -config.keep_checkpoints]:
            shutil.rmtree(old)


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted(path for path in (output / "checkpoints").glob("step-*") if path.name[5:].isdecimal())


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(accelerator: Accelerator, config: TrainConfig, sources: dict[str, str | None]) -> int:
    """Restore the newest checkpoint that can be read, and return its step, 0 if there is none.

    A newer checkpoint that cannot be read is named, and renamed so that the run can save that step again.

    Raises:
        ConfigError: settings, data, tokenizer or teacher differ from those of the run (the message names
            them), or no checkpoint can be read.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(config.output)):
        problem = _restore(accelerator, config, sources, folder)
        failures = torch.tensor(int(problem is not None), device=accelerator.device)
        if accelerator.reduce(failures, "sum"):  # pyright: ignore[reportArgumentType]
            broken[folder] = problem or "another process cannot read it"
            if accelerator.is_main_process:
                print(f"{folder} cannot be read: {broken[folder]}", file=sys.stderr, flush=True)
            continue
        if accelerator.is_main_process:
            for path in broken:
                shutil.rmtree(path.with_name(f"broken-{path.name}"), ignore_errors=True)
                path.rename(path.with_name(f"broken-{path.name}"))
        return step_of(folder)
    if broken:
        raise ConfigError(f"output: no checkpoint can be read: {'; '.join(map(str, broken))}")
    return 0


def _restore(
    accelerator: Accelerator, config: TrainConfig, sources: dict[str, str | None], folder: Path
) -> str | None:
    """Restore a checkpoint, or return why it cannot be read."""
    try:
        before: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    if changed := differences(before, resume_fingerprint(config) | sources):
        raise ConfigError(f"{changed}. A resumed run keeps its settings; use another output for a new run")
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # every serialisation library raises its own type
        return " ".join(str(error).split())
    return None
