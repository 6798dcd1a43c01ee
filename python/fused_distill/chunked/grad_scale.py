"""The power of two that multiplies float16 logit gradients, whose smallest number is 6e-8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import DivergenceForm, LossConfig
from ..validation import FORBIDDEN_LOGPROB

_LARGEST = 15  # logit gradients stay below 2^15, half of float16's largest number
_LARGEST_POWER = 60  # leaves the scaled gradients within float32's range
# Reverse KL's gradient p_s (log p_s - log p_t - KL) is at most a quarter of the largest difference of two
# log ratios. This is for differences of 512.
_LARGEST_REVERSE_KL = 128.0
_REVERSE_KL = (DivergenceForm.REVERSE_KL, DivergenceForm.MIXED_KL)  # or a share of it


def largest_logit_gradient(config: LossConfig) -> float:
    """Return a bound on the absolute logit gradient of a row whose weight is 1.

    That of forward KL, p_s - p_t, is at most 1, as is that of the cross entropy. That of the mixture is at
    most (1 - beta) (beta - log(1 - beta)) < 1, because log(m / p_s) is between log(1 - beta) and
    beta p_t / p_s. That of KL(p_t || m) is at most 1 - alpha, because p_s p_t / m <= p_t / (1 - alpha). That
    of KL(p_s || m) is p_s (h - sum p_s h) with h = log(p_s / m) + (1 - alpha) p_t / m, where p_s h >= -1/e
    and 0 <= sum p_s h <= max h <= 1 - log(alpha). A clipped term has h = 0, which is within these limits.
    """
    divergence = 1.0
    if config.form in _REVERSE_KL:
        divergence = _LARGEST_REVERSE_KL
    elif config.form is DivergenceForm.SKEW_REVERSE_KL:
        divergence = 1.5 - math.log(config.alpha)
    soft = config.soft_weight * config.inv_temperature * divergence
    return config.student_logit_scale * (soft + config.hard_weight)


def excess_over_bound(config: LossConfig, logprobs: Tensor) -> Tensor | None:
    """Return (n,) factors >= 1 of `largest_logit_gradient` for a top-k teacher's (n, K); None: 1.

    Reverse KL's gradient is at most a quarter of the largest -log p_t of a token that counts, which may be
    thousands.
    """
    if config.form not in _REVERSE_KL:
        return None
    surprise = torch.where(logprobs <= FORBIDDEN_LOGPROB, 0.0, -logprobs).amax(-1)
    return (surprise / (4 * _LARGEST_REVERSE_KL)).clamp_min(1.0)


def float16_grad_scale(config: LossConfig, weight: Tensor | None, device: torch.device) -> Tensor:
    """Return a 0-d power of two that brings the largest logit gradients near float16's largest number.

    Args:
        config: options of the loss.
        weight: (n,) factors of the tokens' losses, of valid tokens only; None: 1. The host does not wait for
            them. If one is not finite, or all are 0, they are taken as 1.
        device: where to put the result.
    """
    largest = largest_logit_gradient(config)
    power = 2.0 ** min(_LARGEST - math.ceil(math.log2(largest)), _LARGEST_POWER) if largest else 1.0
    if weight is None or not len(weight):
        return torch.full((), power, dtype=torch.float32, device=device)
    largest_weight = weight.abs().max()
    mantissa, _ = torch.frexp(largest_weight)
    by_weight = mantissa / largest_weight  # 2^-e for largest_weight = mantissa * 2^e, 0.5 <= mantissa < 1
    usable = (largest_weight > 0) & largest_weight.isfinite() & by_weight.isfinite()
    return torch.where(usable, by_weight, 1.0) * power
