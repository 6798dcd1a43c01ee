"""Passes over the columns outside a top-k support, by Triton kernels."""

from __future__ import annotations

import torch
from fused_distill_kernels import tail_gradient, tail_sums
from torch import Tensor

from ..chunked.gemm import float64_if_supported
from ..chunked.workspace import Workspace
from ..config import LossConfig
from .base import TailStatistics
from .elementwise import exp_sub_max
from .full_triton import kernel_workspace


class TritonTail:
    """`TailKernels` by kernels; the tiles' partial sums are added in float64."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the tiles' partial sums."""
        return kernel_workspace(n_columns)

    def statistics(
        self, logits: Tensor, bias: Tensor | None, config: LossConfig, *, block_rows: int | None
    ) -> TailStatistics:
        """Return the log-sum-exp parts of each row's tail."""
        del block_rows
        want_y = config.needs_two_softmaxes
        parts = tail_sums(logits, config, bias=bias, want_y=want_y).to(float64_if_supported(logits.device))
        z = _combine_tiles(parts[:, 0], parts[:, 1])
        return TailStatistics(*z, *(_combine_tiles(parts[:, 2], parts[:, 3]) if want_y else z))

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
        second_factor = torch.zeros_like(factor_z) if factor_y is None else factor_y
        columns = (tail.max_z, factor_z, tail.max_y, second_factor)
        rows = torch.stack(columns, -1).to(torch.float32)
        tail_gradient(logits, rows, out, config, bias=bias, want_y=factor_y is not None)


def _combine_tiles(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row's maximum and sum of exponentials from those of its tiles, (n, tiles) each."""
    max_logit = maxima.amax(-1, keepdim=True)
    return max_logit.squeeze(-1), (sums * exp_sub_max(maxima, max_logit)).sum(-1)
