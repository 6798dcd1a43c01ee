"""Files and folders that appear complete or not at all, even if the process is killed or the disk is full."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Generator[Path, None, None]:
    """Give a scratch path to write to, which replaces the file at the end of the block."""
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        yield scratch
        _flush(scratch)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def replace_folder(scratch: Path, folder: Path) -> None:
    """Rename a folder, whose files are written to the disk before; it replaces an older folder."""
    for path in filter(Path.is_file, scratch.rglob("*")):
        _flush(path)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
