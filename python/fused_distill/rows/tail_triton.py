"""The columns outside a top-k support on the Triton backend: kernel launches, tiles summed in float64."""

from __future__ import annotations

from typing import Any

import torch
from fused_distill_kernels import rest_gradients, rest_sums
from torch import Tensor

from ..chunked.teacher import wide_dtype
from ..config import LossSettings
from .topk import RestStatistics, exp_below


def rest_statistics(
    logits: Tensor,  # (n, V) float32
    bias: Tensor | None,  # (V,)
    settings: LossSettings,
    *,
    block_rows: int,
) -> RestStatistics:
    """`_topk_rows.rest_statistics` by a kernel; block_rows is not needed."""
    del block_rows
    want_y = settings.needs_two_softmaxes
    parts = rest_sums(logits, bias=bias, want_y=want_y, **_transform(settings)).to(wide_dtype(logits.device))
    z = _combine(parts[:, 0], parts[:, 1])
    return RestStatistics(*z, *(_combine(parts[:, 2], parts[:, 3]) if want_y else z))


def rest_gradient(
    logits: Tensor,  # (n, V) float32
    bias: Tensor | None,  # (V,)
    settings: LossSettings,
    rest: RestStatistics,
    factor_z: Tensor,  # (n,)
    factor_y: Tensor | None,  # (n,)
    out: Tensor,  # (n, V)
    *,
    block_rows: int,
) -> None:
    """`_topk_rows.rest_gradient` by a kernel; block_rows is not needed."""
    del block_rows
    columns = (rest.max_z, factor_z, rest.max_y, torch.zeros_like(factor_z) if factor_y is None else factor_y)
    rows = torch.stack(columns, -1).to(torch.float32)
    rest_gradients(logits, rows, out, bias=bias, want_y=factor_y is not None, **_transform(settings))


def _transform(settings: LossSettings) -> dict[str, Any]:
    return {
        "temperature": settings.temperature,
        "logit_scale": settings.student_logit_scale,
        "softcap": settings.student_softcap,
    }


def _combine(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """A row's maximum and sum of exponentials from its tiles' (n, tiles)."""
    top = maxima.amax(-1, keepdim=True)
    return top.squeeze(-1), (sums * exp_below(maxima, top)).sum(-1)
