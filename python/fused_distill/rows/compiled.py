"""Stages of row arithmetic, compiled where that works, else eager on a block of rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..chunked.workspace import blocks

Stage = Callable[..., tuple[Any, ...]]  # tensors with a row's numbers in each row, or None


class Compiler:
    """Whether torch.compile has worked until now."""

    works = True


@cache
def compiled_stage(stage: Stage) -> Stage:
    """The stage compiled once for all shapes."""
    return torch.compile(stage, dynamic=True)


def run_stage(
    stage: Stage,
    arguments: Callable[[slice], tuple[Any, ...]],  # the stage's, for a block of rows
    n: int,
    *,
    block_rows: int | None,  # rows held at once when eager; None: all
    compiled: bool,
) -> tuple[Any, ...]:
    """What the stage gives of n rows."""
    if compiled and Compiler.works:
        try:
            return compiled_stage(stage)(*arguments(slice(0, n)))
        except Exception as error:  # a missing or broken compiler shows in many types, before any write
            Compiler.works = False
            warnings.warn(
                f"fused_distill: torch.compile failed ({type(error).__name__}), the row arithmetic runs "
                "eagerly and several times slower; a C++ compiler on the PATH mends this",
                RuntimeWarning,
                stacklevel=2,
            )
    parts = [stage(*arguments(block)) for block in blocks(n, block_rows or max(n, 1))]
    if len(parts) == 1:
        return parts[0]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
