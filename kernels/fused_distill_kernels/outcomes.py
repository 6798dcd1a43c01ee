"""The outcomes of one row of a top-k loss in float64: their numbers, and their terms of loss and gradient."""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

from .elementwise import exp_sub_max, mul_zero_safe
from .elementwise64 import kl_terms, mixture_log_ratios, stable_prob_diff
from .jsd import FORWARD, REVERSE


@triton.jit
def tail_parts(parts_ptr, n_parts, PARTS: tl.constexpr):
    """Combine the parts of a row's tail; return its maximum and its sum of e^(z - maximum)."""
    index = tl.arange(0, PARTS)
    maxima = tl.load(parts_ptr + index, mask=index < n_parts, other=float("-inf"))
    others = tl.load(parts_ptr + n_parts + index, mask=index < n_parts, other=0.0)
    max_logit = tl.max(maxima, 0)
    return max_logit, tl.sum((1.0 + others) * exp_sub_max(maxima, max_logit), 0)


@triton.jit
def load_outcomes(y_ptr, logprobs_ptr, index, k):
    """Return the student's logits at temperature 1 and the teacher's log-probabilities, -inf beyond k."""
    y = tl.load(y_ptr + index, mask=index < k, other=float("-inf"))
    return y, tl.load(logprobs_ptr + index, mask=index < k, other=float("-inf")).to(tl.float64)


@triton.jit
def outcome_terms(p_s, p_t, d, beta, one_minus_beta, DIVERGENCE: tl.constexpr, IS_DIVERGENCE: tl.constexpr):
    """Return the terms of KL(p_s || m) and of KL(p_t || m); without a mixture twice those of the only KL.

    IS_DIVERGENCE is False for the plain sums of tail="truncate", whose terms have any sign.
    """
    prob_diff = stable_prob_diff(p_s, p_t, d)
    if DIVERGENCE == FORWARD:
        u, v = -d, -d
        of_student, of_teacher = -prob_diff, -prob_diff
    elif DIVERGENCE == REVERSE:
        u, v = d, d
        of_student, of_teacher = prob_diff, prob_diff
    else:
        u, v = mixture_log_ratios(d, beta, one_minus_beta)
        of_student, of_teacher = beta * prob_diff, -one_minus_beta * prob_diff
    if IS_DIVERGENCE:
        student, teacher = kl_terms(p_s, u, of_student), kl_terms(p_t, v, of_teacher)
    else:
        student, teacher = mul_zero_safe(p_s, -u), mul_zero_safe(p_t, -v)
    if DIVERGENCE == FORWARD:
        student = teacher
    if DIVERGENCE == REVERSE:
        teacher = student
    return student, teacher


@triton.jit
def log_prob_gradient(p_s, p_t, d, beta, one_minus_beta, DIVERGENCE: tl.constexpr):
    """Return the derivative of the loss by each outcome's log p_s."""
    if DIVERGENCE == FORWARD:
        gradient = -p_t
    elif DIVERGENCE == REVERSE:
        gradient = mul_zero_safe(p_s, 1.0 - d)
    else:
        u, _ = mixture_log_ratios(d, beta, one_minus_beta)
        gradient = one_minus_beta * mul_zero_safe(p_s, -u)
    return gradient
