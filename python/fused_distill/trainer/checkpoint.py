"""Checkpoints that are whole or not there, whatever ends the process or fills the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """All of accelerate's state, in a folder that gets its name when it is whole; then older ones go."""
    folder = output / "checkpoints"
    scratch, final = folder / "unfinished", folder / f"step-{step:08}"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not final.exists():
        scratch.replace(final)
        for old in _whole(output)[:-keep]:
            shutil.rmtree(old)


def latest_checkpoint(output: Path) -> Path | None:
    """The last whole one."""
    return next(reversed(_whole(output)), None)


def _whole(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob("step-*"))
