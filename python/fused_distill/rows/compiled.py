"""Stages of row arithmetic: by torch.compile where it works, else eager, on one block of rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..chunked.workspace import Workspace, blocks

Stage = Callable[..., tuple[Any, ...]]  # of tensors with one entry per row in their first dimension, or None

_ELEMENTS_PER_BLOCK = 1 << 20  # logits of an eager block


class Compiler:
    """State of torch.compile in this process."""

    works = True  # set to False once a compilation has failed


@cache
def compiled_stage(stage: Stage) -> Stage:
    """Return the stage compiled once for all shapes."""
    return torch.compile(stage, dynamic=True)


def eager_workspace(n_temporaries: int, n_columns: int, dtype: torch.dtype) -> Workspace:
    """Return the memory of eager stages that hold n_temporaries tensors of a block's size at once."""
    block_row_bytes = n_temporaries * n_columns * dtype.itemsize
    return Workspace(per_block_row=block_row_bytes, block_rows=_ELEMENTS_PER_BLOCK // n_columns)


def run_stage(
    stage: Stage,
    arguments: Callable[[slice], tuple[Any, ...]],
    n: int,
    *,
    block_rows: int | None,
    compiled: bool,
) -> tuple[Any, ...]:
    """Run a stage on n rows.

    Args:
        stage: function of the arguments of a block of rows.
        arguments: returns the stage's arguments for a block.
        n: number of rows.
        block_rows: rows held at once when eager; None: all.
        compiled: use torch.compile, unless it has failed before.
    """
    if compiled and Compiler.works:
        try:
            return compiled_stage(stage)(*arguments(slice(0, n)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many types, without a working compiler; nothing is written yet
            Compiler.works = False
            warnings.warn(
                f"fused_distill: torch.compile failed ({type(error).__name__}), falling back to eager mode, "
                "which is several times slower. Install a C++ compiler to enable it",
                RuntimeWarning,
                stacklevel=2,
            )
    parts = [stage(*arguments(block)) for block in blocks(n, block_rows or max(n, 1))]
    if len(parts) == 1:
        return parts[0]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
