"""NaN in memory that nobody has written, so that a test fails if its result depends on such memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fill_uninitialized_memory(fill: bool = True) -> None:
    """Make torch.empty, new_empty, empty_like and resize_ give NaN, and the largest number for integers.

    PyTorch does so under deterministic algorithms. An operation that has no such algorithm warns, and runs.
    The debug mode turns them on without an import of Inductor, which takes a second in each process.
    """
    torch.set_deterministic_debug_mode("warn" if fill else "default")


@contextmanager
def filled_uninitialized_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN until the end of the context."""
    fill_uninitialized_memory()
    try:
        yield
    finally:
        fill_uninitialized_memory(False)
