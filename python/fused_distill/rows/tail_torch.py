"""Passes over the columns outside a top-k support, in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunked.gemm import float64_if_supported
from ..chunked.workspace import Workspace
from ..config import LossConfig, Scalars
from .base import TailStatistics
from .elementwise import exp_sub_max, transform_logits
from .row_blocks import in_blocks, temporaries

_TEMPORARIES = 8  # tensors of a block's size that the larger stage holds at once


@dataclass(frozen=True)
class TorchTail:
    """Passes over the tail's columns. The support's columns hold -inf."""

    device_type: str = "cpu"

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the temporaries of a block."""
        return temporaries(_TEMPORARIES, n_columns, dtype, self.device_type)

    def statistics(
        self, logits: Tensor, bias: Tensor | None, config: LossConfig, *, block_rows: int | None
    ) -> TailStatistics:
        """Return the log-sum-exp parts of each row's tail."""
        run = partial(in_blocks, n=len(logits), block_rows=block_rows)
        one_softmax = not config.needs_two_softmaxes
        rows = _Rows.of(logits, bias, config)

        def arguments(block: slice) -> tuple[Any, ...]:
            return rows.block(block), one_softmax

        max_z, max_y = run(_maxima, arguments)
        sum_z, sum_y = run(_sums, lambda block: (*arguments(block), max_z[block], max_y[block]))
        return TailStatistics(*(c.squeeze(-1).to(sum_z.dtype) for c in (max_z, sum_z, max_y, sum_y)))

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

        def column(values: Tensor) -> Tensor:
            return values.to(logits.dtype).unsqueeze(-1)

        max_z, max_y, factor_z = column(tail.max_z), column(tail.max_y), column(factor_z)
        factor_y = None if factor_y is None else column(factor_y)
        rows = _Rows.of(logits, bias, config)

        def arguments(block: slice) -> tuple[Any, ...]:
            return (
                rows.block(block),
                max_z[block],
                factor_z[block],
                max_y[block],
                None if factor_y is None else factor_y[block],
                out[block],
            )

        in_blocks(_gradient, arguments, len(logits), block_rows=block_rows)


class _Rows(NamedTuple):
    """A block of projections and the numbers that turn them into logits."""

    x: Tensor  # (n, V), -inf in the columns of the support
    bias: Tensor | None  # (V,)
    scalars: Tensor  # (13,), see `Scalars`
    has_softcap: bool

    @classmethod
    def of(cls, logits: Tensor, bias: Tensor | None, config: LossConfig) -> _Rows:
        return cls(logits, bias, config.scalars(logits.dtype), config.student_softcap is not None)

    def block(self, block: slice) -> _Rows:
        return self._replace(x=self.x[block])


def _tail_logits(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, its derivative with respect to the projection, and z; -inf in the columns of the support."""
    scalars = Scalars(*rows.scalars.unbind())
    softcap = scalars.student_softcap if rows.has_softcap else None
    y, dlogit_dproj = transform_logits(rows.x, rows.bias, scalars.student_logit_scale, softcap)
    if rows.has_softcap:
        y = torch.where(rows.x == -torch.inf, -torch.inf, y)
    return y, dlogit_dproj, y * scalars.inv_temperature


def _maxima(rows: _Rows, one_softmax: bool) -> tuple[Tensor, Tensor]:
    y, _, z = _tail_logits(rows)
    max_z = z.amax(-1, keepdim=True)
    return max_z, max_z if one_softmax else y.amax(-1, keepdim=True)


def _sums(rows: _Rows, one_softmax: bool, max_z: Tensor, max_y: Tensor) -> tuple[Tensor, Tensor]:
    y, _, z = _tail_logits(rows)
    wide = float64_if_supported(rows.x.device)
    sum_z = exp_sub_max(z, max_z).sum(-1, keepdim=True, dtype=wide)
    return sum_z, sum_z if one_softmax else exp_sub_max(y, max_y).sum(-1, keepdim=True, dtype=wide)


def _gradient(
    rows: _Rows, max_z: Tensor, factor_z: Tensor, max_y: Tensor, factor_y: Tensor | None, out: Tensor
) -> tuple[()]:
    y, dlogit_dproj, z = _tail_logits(rows)
    grad = factor_z * exp_sub_max(z, max_z)
    if factor_y is not None:
        grad = grad + factor_y * exp_sub_max(y, max_y)
    out.copy_(grad * dlogit_dproj)
    return ()
