"""Checkpoints that are whole or not there, whatever ends the process or fills the disk."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

# It warns at every checkpoint that tied weights are written once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """All of accelerate's state, in a folder that gets its name when it is whole; then older ones go.

    Raises:
        OSError: it cannot be written; those before are as they were.
    """
    folder = output / "checkpoints"
    scratch = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(scratch))
    except Exception as error:  # each of the writers of tensors has errors of its own
        raise OSError(f"the checkpoint of step {step} cannot be written: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in filter(Path.is_file, scratch.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        scratch.replace(folder / f"step-{step:08}")
        for old in checkpoints(output)[:-keep]:
            shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    """The whole ones, the last at the end."""
    return sorted((output / "checkpoints").glob("step-*"))
