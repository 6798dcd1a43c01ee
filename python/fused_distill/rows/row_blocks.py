"""Row arithmetic in PyTorch on one block of rows at a time, which bounds its temporaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chunked.workspace import Workspace, blocks

Stage = Callable[..., tuple[Any, ...]]  # of tensors with one entry per row in their first dimension, or None

# Logits of a block: on a CPU its temporaries fit the caches, elsewhere a block keeps the device busy.
_CPU_BLOCK_ELEMENTS = 1 << 20
_DEVICE_BLOCK_ELEMENTS = 1 << 25


def temporaries(count: int, n_columns: int, dtype: torch.dtype, device_type: str) -> Workspace:
    """Return the memory of stages that hold `count` tensors of a block's size at once."""
    elements = _CPU_BLOCK_ELEMENTS if device_type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    return Workspace(per_block_row=count * n_columns * dtype.itemsize, block_rows=elements // n_columns)


def in_blocks(
    stage: Stage, arguments: Callable[[slice], tuple[Any, ...]], n: int, *, block_rows: int | None
) -> tuple[Any, ...]:
    """Run a stage on n rows.

    Args:
        stage: function of the arguments of a block of rows.
        arguments: returns the stage's arguments for a block.
        n: number of rows.
        block_rows: rows of a block; None: all rows at once.
    """
    parts = [stage(*arguments(block)) for block in blocks(n, block_rows or max(n, 1))]
    if len(parts) == 1:
        return parts[0]
    return tuple(_joined(column) for column in zip(*parts, strict=True))


def _joined(column: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in column if part is not None]
    return torch.cat(present) if present else None
