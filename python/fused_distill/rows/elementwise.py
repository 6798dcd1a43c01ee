"""Elementwise formulas of the row losses, accurate where the two models are close.

`fused_distill_kernels.elementwise` and cpp/elementwise.h have the same functions by the same names. These
serve every floating dtype. With d = log p_t - log p_s:

- d = x - c with x = (z_t - z_s) - (max_t - max_s). Close logits subtract exactly (`gap_beyond`). With p and q
  the exponentials relative to each model's maximum, c = log(sum q / sum p) = log1p(sum(q - p) / sum p) is no
  difference of two large rounded numbers (`log_ratio`).
- p_t - p_s = sign(d) max(p_t, p_s) (1 - e^-|d|) (`stable_prob_diff`).
- KL(p || m) = sum p (e^x - 1 - x) with x = log m - log p. Every term is >= 0, and a Taylor polynomial gives
  e^x - 1 - x near 0 (`kl_terms`).
- With q the larger of the two probabilities, p the smaller and k the weight of p in m, log m - log q is
  log1p(k expm1(-|d|)), and where this is far from 0, log(1 - k + k e^-|d|). The other log ratio is |d| more.
  Where m is mostly p, log m - log p = log1p((1 - k) expm1(|d|)) comes first, because the sum would cancel
  (`mixture_log_ratios`).
- (p_t - p_s) / m has the same 1 - k + k e^-|d| = m / q below the line (`mixture_ratio`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transform_logits(
    x: Tensor,  # (..., V) projections
    bias: Tensor | None,  # (V,)
    scale: Tensor,
    softcap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return softcap * tanh(scale * (x + bias) / softcap) and its derivative with respect to x."""
    if bias is not None:
        x = x + bias
    x = x * scale
    if softcap is None:
        return x, scale
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, scale * (1 - tanh * tanh)


def log_gap(z_s: Tensor, z_t: Tensor) -> Tensor:
    """Return z_t - z_s, and 0 where both are the same infinity."""
    return torch.where(z_t == z_s, 0.0, z_t - z_s)


def exp_sub_max(z: Tensor, max_logit: Tensor) -> Tensor:
    """Return e^(z - max_logit) for z <= max_logit, and 0 where z is -inf, even if max_logit is -inf too."""
    return (z - torch.where(max_logit == -torch.inf, 0.0, max_logit)).exp()


def gap_beyond(z_s: Tensor, z_t: Tensor, max_s: Tensor, max_t: Tensor) -> Tensor:
    """Return (z_t - z_s) - (max_t - max_s) in the dtype of max_s, and 0 where z_s and z_t are both -inf.

    The multiple of 16 closest to max_t - max_s is subtracted from z_t first, which is exact where the
    probability counts. So an offset of the teacher's logits does not cost digits of the difference. Logits
    that a transform has rounded are passed in float64.
    """
    offset = torch.round((max_t - max_s) / 16) * 16
    gap = ((z_t - offset) - z_s) - ((max_t - offset) - max_s).to(z_t.dtype)
    return torch.where(torch.maximum(z_s, z_t) == -torch.inf, 0.0, gap).to(max_s.dtype)


def log_ratio(p: Tensor, q: Tensor, difference: Tensor) -> Tensor:
    """Return log(q / p), given the difference q - p without cancellation."""
    excess = difference / p
    return torch.where(excess.abs() < 0.5, torch.log1p(excess), (q / p).log())


def stable_prob_diff(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """Return b - a for a, b >= 0, given log_ratio = log(b / a)."""
    return torch.where(log_ratio > 0, -b, a) * expm1(-log_ratio.abs())


def kl_terms(p: Tensor, x: Tensor, prob_diff: Tensor) -> Tensor:
    """Return p (e^x - 1 - x) >= 0, the terms of KL(p || m) with x = log m - log p and prob_diff = m - p."""
    near = p * (x * x) * taylor_remainder(x)
    return torch.where(_use_taylor(x), near, (prob_diff - mul_zero_safe(p, x)).clamp_min(0.0))


def mixture_log_ratios(d: Tensor, beta: Tensor, one_minus_beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return log m - log p_s and log m - log p_t for m = beta p_t + (1 - beta) p_s, with 0 < beta < 1."""
    distance = d.abs()
    share, rest = _shares(d, beta, one_minus_beta)
    ratio, shrinking = torch.exp(-distance), expm1(-distance)
    below, above = share * shrinking, -rest * shrinking / ratio
    by_smaller = (rest < share) & (above < 1)
    toward_larger = torch.where(below < -0.5, (rest + share * ratio).log(), below.log1p())
    toward_smaller = torch.where(by_smaller, above.log1p(), toward_larger + distance)
    toward_larger = torch.where(by_smaller, toward_smaller - distance, toward_larger)
    return (
        torch.where(d > 0, toward_smaller, toward_larger),
        torch.where(d > 0, toward_larger, toward_smaller),
    )


def mixture_ratio(d: Tensor, beta: Tensor, one_minus_beta: Tensor) -> Tensor:
    """Return (p_t - p_s) / m for m = beta p_t + (1 - beta) p_s, with 0 < beta < 1."""
    share, rest = _shares(d, beta, one_minus_beta)
    lead = expm1(-d.abs()) / (rest + share * torch.exp(-d.abs()))
    return torch.where(d > 0, -lead, lead)


def _shares(d: Tensor, beta: Tensor, one_minus_beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the smaller and the larger of the two probabilities have of the mixture."""
    # Arithmetic instead of torch.where, which would copy the two CPU scalars to a GPU and wait for it.
    teacher = (d > 0).to(d.dtype)
    student = 1 - teacher
    return teacher * one_minus_beta + student * beta, teacher * beta + student * one_minus_beta


def mul_zero_safe(p: Tensor, x: Tensor) -> Tensor:
    """Return p x, and 0 where p is 0 even if x is infinite."""
    return torch.where(p == 0, 0.0, p * x)


def expm1(x: Tensor) -> Tensor:
    """Return e^x - 1 for x <= 0, by a polynomial near 0, where exp(x) - 1 cancels."""
    return torch.where(_use_taylor(x), x + x * x * taylor_remainder(x), torch.exp(x) - 1)


def taylor_remainder(x: Tensor) -> Tensor:
    """Return (e^x - 1 - x) / x^2 for |x| < 0.5 to the precision of x's dtype."""
    terms = 14 if x.dtype == torch.float64 else 8
    value = torch.full_like(x, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        value = value * x + 1 / math.factorial(k)
    return value


def _use_taylor(x: Tensor) -> Tensor:
    """Return True where `taylor_remainder` applies; elsewhere a plain difference loses at most 3 bits."""
    return x.abs() < 0.5
