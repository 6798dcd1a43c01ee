"""Passes over the columns outside a top-k support on the CPU in C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import LossConfig
from .base import TailStatistics
from .cpp.library import arguments_type, call, pointer

_Arguments = arguments_type(
    rows="i",
    columns="i",
    threads="i",
    logits="p",
    stride="i",
    bias="p",
    scalars="p",
    has_softcap="i",
    max_z="p",
    sum_z="p",
    max_y="p",
    sum_y="p",
    factor_z="p",
    factor_y="p",
    grad="p",
    grad_stride="i",
)


@dataclass(frozen=True)
class CppTail:
    """Passes over the tail's columns. The support's columns hold -inf."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return no memory: a few numbers per row alone."""
        del n_columns, dtype
        return Workspace()

    def statistics(
        self, logits: Tensor, bias: Tensor | None, config: LossConfig, *, block_rows: int | None
    ) -> TailStatistics:
        """Return the log-sum-exp parts of each row's tail."""
        del block_rows
        numbers = logits.new_empty((4, len(logits)), dtype=torch.float64)
        _run(logits, bias, config, TailStatistics(*numbers))
        return TailStatistics(*numbers)

    def gradient(
        self,
        logits: Tensor,
        bias: Tensor | None,
        config: LossConfig,
        tail: TailStatistics,
        factor_z: Tensor,
        factor_y: Tensor | None,
        out: Tensor,
        *,
        block_rows: int | None,
    ) -> None:
        """Write the tail's gradient to out, 0 in the columns of the support."""
        del block_rows
        _run(
            logits,
            bias,
            config,
            TailStatistics(*(column.contiguous() for column in tail)),
            factor_z=factor_z.double().contiguous(),
            factor_y=None if factor_y is None else factor_y.double().contiguous(),
            grad=out,
        )


def _run(
    logits: Tensor,
    bias: Tensor | None,
    config: LossConfig,
    tail: TailStatistics,
    grad: Tensor | None = None,
    **factors: Tensor | None,
) -> None:
    """Compute the statistics, or the gradient if there is a tensor for it."""
    scalars = config.scalars(torch.float64)
    of_rows = tail._asdict() | factors
    columns: dict[str, Any] = {name: pointer(column, torch.float64) for name, column in of_rows.items()}
    arguments = _Arguments(
        rows=len(logits),
        columns=logits.shape[1],
        threads=torch.get_num_threads(),
        logits=pointer(logits, logits.dtype),
        stride=logits.stride(0),
        bias=pointer(bias, logits.dtype),
        scalars=pointer(scalars, torch.float64),
        has_softcap=config.student_softcap is not None,
        grad=pointer(grad, logits.dtype),
        grad_stride=0 if grad is None else grad.stride(0),
        **columns,
    )
    call("tail", logits.dtype, arguments)
