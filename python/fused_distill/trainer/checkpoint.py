"""Checkpoints that are whole or not there, whatever ends the process or fills the disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from .config import ConfigError, TrainConfig, lasting

# It warns at every checkpoint that tied weights are written once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

SETTINGS = "settings.json"  # those that the run keeps when it goes on


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """All of accelerate's state, in a folder that gets its name when it is whole; then older ones go.

    Raises:
        OSError: it cannot be written; those before are as they were.
    """
    folder = config.output / "checkpoints"
    scratch = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / SETTINGS).write_text(json.dumps(lasting(config)))
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(scratch))
    except Exception as error:  # each of the writers of tensors has errors of its own
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} cannot be written: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in filter(Path.is_file, scratch.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        scratch.replace(folder / f"step-{step:08}")
        for old in checkpoints(config.output)[: -config.keep_checkpoints]:
            shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    """The whole ones, the last at the end."""
    return sorted((output / "checkpoints").glob("step-*"))


def load_checkpoint(accelerator: Accelerator, config: TrainConfig, folder: Path) -> int:
    """The state that `save_checkpoint` wrote; returns its step.

    Raises:
        ConfigError: the run had other settings.
    """
    before, now = json.loads((folder / SETTINGS).read_text()), lasting(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        said = "; ".join(f"{key}: was {before.get(key)} before, is {now.get(key)}" for key in changed)
        raise ConfigError(f"{said}. A run goes on with its settings; another run needs another output")
    accelerator.load_state(str(folder))
    return int(folder.name.removeprefix("step-"))
