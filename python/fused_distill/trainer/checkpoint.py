"""Checkpoints that appear complete or not at all, even if the process is killed or the disk is full."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .config import ConfigError, TrainConfig, resume_fingerprint

# It warns at every checkpoint that tied weights are saved once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

SETTINGS = "settings.json"  # the settings that must match on resume


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Save accelerate's state atomically (temporary folder, then rename), then prune old checkpoints."""
    folder = config.output / "checkpoints"
    scratch = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / SETTINGS).write_text(json.dumps(resume_fingerprint(config)))
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(scratch))
    except Exception as error:  # every serialisation library raises its own type
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} cannot be saved: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in filter(Path.is_file, scratch.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        scratch.replace(folder / f"step-{step:08}")
        for old in list_checkpoints(config.output)[: -config.keep_checkpoints]:
            shutil.rmtree(old)


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-*"))


def load_checkpoint(accelerator: Accelerator, config: TrainConfig, folder: Path) -> int:
    """Restore the state saved by `save_checkpoint` with the same settings, and return its step."""
    before: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    now = resume_fingerprint(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        changes = "; ".join(f"{key}: was {before.get(key)} before, is {now.get(key)}" for key in changed)
        raise ConfigError(f"{changes}. A resumed run keeps its settings; use another output for a new run")
    accelerator.load_state(str(folder))
    return int(folder.name.removeprefix("step-"))
