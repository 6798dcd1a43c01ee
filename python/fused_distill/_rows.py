"""Row arithmetic of the divergence in PyTorch: from logits to losses, statistics and logit gradients.

Nothing here cancels when the two models are close. With d = log p_t - log p_s,

- d = (z_t - z_s) - c, where c = lse_t - lse_s = log1p(sum(e^z_t - e^z_s) / sum e^z_s): neither the
  difference of close logits nor c is a difference of two large rounded numbers (`_log_ratio`);
- p_t - p_s = sign(d) max(p_t, p_s) (1 - e^-|d|) (`_signed_gap`);
- KL(p || m) = sum p (e^x - 1 - x) with x = log m - log p: every term is >= 0, and a Taylor polynomial gives
  e^x - 1 - x near 0 (`_kl_terms`);
- log m - log p = log1p(k expm1(-|d|)) on the side where that argument is in (-1, 0] (`_mixture_log_ratios`).

The same functions serve every floating dtype, eager and compiled, and are what the Triton kernels compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from ._settings import DistillStats, LossSettings, RowResult


class Divergence(Enum):
    """The three shapes of the generalized Jensen-Shannon divergence."""

    FORWARD = 0
    REVERSE = 1
    MIXTURE = 2

    @classmethod
    def of(cls, beta: float) -> Divergence:
        """The shape for a value of beta."""
        return cls.FORWARD if beta == 0 else cls.REVERSE if beta == 1 else cls.MIXTURE


def row_divergence(
    student_logits: Tensor,  # (n, V) as projected
    teacher_logits: Tensor,  # (n, V) as projected
    weight: Tensor,  # (n,) factor of each row's loss
    settings: LossSettings,
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    labels: Tensor | None = None,  # (n,) int64, -100 where there is none; needed if settings.hard_weight != 0
    grad: Tensor | None = None,  # (n, V) receives d(sum of losses) / d(student_logits); see below
    return_stats: bool = False,
    block_rows: int | None = None,  # rows whose temporaries may be held at once; None: all
    compiled: bool = False,
) -> RowResult:
    """Loss, statistics and logit gradient of each row, a block of rows at a time.

    `grad` may be the object student_logits, to be overwritten, but no other view of the same memory:
    torch.compile computes nonsense for arguments that overlap when their offsets change.
    """
    numbers = torch.tensor(
        [
            settings.beta,
            1.0 - settings.beta,
            1.0 / settings.temperature,
            settings.student_logit_scale,
            settings.teacher_logit_scale,
            settings.student_softcap or 1.0,
            settings.teacher_softcap or 1.0,
            settings.hard_weight,
            settings.soft_weight,
        ],
        dtype=student_logits.dtype,
    )
    row_divergence_block = _compiled_block() if compiled else _row_divergence_block
    results: list[RowResult] = []
    for rows in _blocks(len(student_logits), block_rows):
        student_block = student_logits[rows]
        grad_block = None if grad is None else student_block if grad is student_logits else grad[rows]
        result = row_divergence_block(
            student_block,
            teacher_logits[rows],
            weight[rows],
            numbers,
            student_bias,
            teacher_bias,
            None if labels is None or settings.hard_weight == 0 else labels[rows],
            grad_block,
            Divergence.of(settings.beta),
            settings.student_softcap is not None,
            settings.teacher_softcap is not None,
            return_stats,
        )
        results.append(result)
    losses, stats = zip(*results, strict=True)
    return RowResult(
        torch.cat(losses),
        DistillStats(*map(torch.cat, zip(*stats, strict=True))) if return_stats else None,
    )


def _blocks(n: int, block_rows: int | None) -> list[slice]:
    """Blocks of nearly equal size: a last block of a single row would be compiled anew."""
    count = math.ceil(n / (block_rows or max(n, 1)))
    edges = [n * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


@lru_cache
def _compiled_block() -> Callable[..., RowResult]:
    return torch.compile(_row_divergence_block, dynamic=True)


def _row_divergence_block(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    numbers: Tensor,  # (9,) in the logits' dtype, so that new values never mean a new compilation
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    grad_out: Tensor | None,
    divergence: Divergence,
    student_has_softcap: bool,
    teacher_has_softcap: bool,
    return_stats: bool,
) -> RowResult:
    beta, not_beta, inv_temperature, s_scale, t_scale, s_softcap, t_softcap, hard_weight, soft_weight = (
        numbers.unbind()
    )
    y_s, dy_s = _transform(student_logits, student_bias, s_scale, s_softcap if student_has_softcap else None)
    y_t, _ = _transform(teacher_logits, teacher_bias, t_scale, t_softcap if teacher_has_softcap else None)
    z_s, z_t = y_s * inv_temperature, y_t * inv_temperature

    max_s, max_t = z_s.amax(-1, keepdim=True), z_t.amax(-1, keepdim=True)
    exp_s, exp_t = (z_s - max_s).exp(), (z_t - max_t).exp()
    sum_s, sum_t = exp_s.sum(-1, keepdim=True), exp_t.sum(-1, keepdim=True)
    p_s, p_t = exp_s / sum_s, exp_t / sum_t
    delta = torch.where(z_t == z_s, 0.0, z_t - z_s)  # two absent tokens (-inf) do not differ
    d = delta - _log_ratio(exp_s, exp_t, delta, max_s, max_t, sum_s, sum_t)
    gap = _signed_gap(p_s, p_t, d)

    if divergence is Divergence.FORWARD:
        soft = _kl_terms(p_t, -d, -gap).sum(-1)
        grad = -gap
    elif divergence is Divergence.REVERSE:
        kl = _kl_terms(p_s, d, gap).sum(-1)
        soft = kl
        grad = _times(p_s, -d - kl.unsqueeze(-1))
    else:
        u, v = _mixture_log_ratios(d, beta, not_beta)
        kl = _kl_terms(p_s, u, beta * gap).sum(-1)
        soft = beta * _kl_terms(p_t, v, -not_beta * gap).sum(-1) + not_beta * kl
        grad = not_beta * _times(p_s, -u - kl.unsqueeze(-1))
    loss = soft_weight * soft
    grad = grad * (inv_temperature * soft_weight)

    if labels is not None:
        has_label = labels >= 0
        label = labels.clamp_min(0).unsqueeze(-1)
        max_y = y_s.amax(-1, keepdim=True)
        exp_y = (y_s - max_y).exp()
        sum_y = exp_y.sum(-1, keepdim=True)
        surprise = sum_y.log() + (max_y - y_s.gather(-1, label))
        loss = loss + torch.where(has_label, hard_weight * surprise.squeeze(-1), 0.0)
        columns = torch.arange(y_s.shape[-1], device=y_s.device)
        residual = exp_y / sum_y - (columns == label).to(y_s.dtype)
        grad = grad + torch.where(has_label.unsqueeze(-1), hard_weight * residual, 0.0)

    stats = None
    if return_stats:
        stats = DistillStats(
            student_entropy=_times(p_s, sum_s.log() - (z_s - max_s)).sum(-1),
            teacher_entropy=_times(p_t, sum_t.log() - (z_t - max_t)).sum(-1),
            forward_kl=_kl_terms(p_t, -d, -gap).sum(-1),
            reverse_kl=_kl_terms(p_s, d, gap).sum(-1),
            top1_agreement=((z_s == max_s) & (z_t == max_t)).any(-1),
        )
    if grad_out is not None:
        grad_out.copy_(grad * dy_s * weight.unsqueeze(-1))
    return RowResult(loss * weight, stats)


def _transform(
    x: Tensor, bias: Tensor | None, scale: Tensor, softcap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits from projections: bias, scale, softcap; and their derivative with respect to the projection."""
    if bias is not None:
        x = x + bias
    x = x * scale
    if softcap is None:
        return x, scale
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, scale * (1 - tanh * tanh)


def _log_ratio(
    exp_s: Tensor,
    exp_t: Tensor,
    delta: Tensor,
    max_s: Tensor,
    max_t: Tensor,
    sum_s: Tensor,
    sum_t: Tensor,
) -> Tensor:
    """c = lse_t - lse_s, (n, 1), with an error that shrinks with the distance between the models."""
    top = torch.maximum(max_s, max_t)
    shift_s, shift_t = (max_s - top).exp(), (max_t - top).exp()
    excess = _signed_gap(exp_s * shift_s, exp_t * shift_t, delta).sum(-1, keepdim=True) / (sum_s * shift_s)
    plain = (max_t - max_s) + (sum_t.log() - sum_s.log())
    return torch.where(excess.abs() < 0.5, torch.log1p(excess), plain)


def _signed_gap(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """b - a for positive a and b, given log(b / a)."""
    return torch.where(log_ratio > 0, -b, a) * _expm1(-log_ratio.abs())


def _kl_terms(p: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    """p (e^x - 1 - x), the terms of KL(p || m) with x = log m - log p and gap = m - p. Never negative."""
    near = p * (x * x) * _series(x)
    return torch.where(_series_serves(x), near, (gap - _times(p, x)).clamp_min(0.0))


# The constants below are literals: torch.compile(dynamic=True) takes a global float for an argument.


def _series_serves(x: Tensor) -> Tensor:
    """Where `_series` is exact enough; elsewhere the plain difference loses at most 3 bits."""
    return x.abs() < 0.5


def _series(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2 near 0 to the precision of x's dtype, by its Taylor polynomial."""
    terms = 14 if x.dtype == torch.float64 else 8
    value = torch.full_like(x, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        value = value * x + 1 / math.factorial(k)
    return value


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x <= 0. (torch.expm1 is exact when eager, but compiled for the CPU it is exp(x) - 1.)"""
    return torch.where(_series_serves(x), x + x * x * _series(x), torch.exp(x) - 1)


def _mixture_log_ratios(d: Tensor, beta: Tensor, not_beta: Tensor) -> tuple[Tensor, Tensor]:
    """log m - log p_s and log m - log p_t for m = beta p_t + (1 - beta) p_s."""
    teacher_leads = d > 0
    toward_larger = torch.log1p(torch.where(teacher_leads, not_beta, beta) * _expm1(-d.abs()))
    toward_smaller = toward_larger + d.abs()
    return (
        torch.where(teacher_leads, toward_smaller, toward_larger),
        torch.where(teacher_leads, toward_larger, toward_smaller),
    )


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 however infinite x is."""
    return torch.where(p > 0, p * x, 0.0)
