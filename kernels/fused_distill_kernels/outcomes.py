"""The outcomes of one row of a top-k loss in float64: their numbers, and their terms of loss and gradient."""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

from .elementwise import (
    FORWARD,
    MIXED,
    MIXTURE,
    REVERSE,
    SKEW_REVERSE,
    TOTAL_VARIATION,
    exp_sub_max,
    is_mixture,
    mul_zero_safe,
)
from .elementwise64 import expm1, kl_terms, mixture_log_ratios, stable_prob_diff


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


@triton.constexpr_function
def is_of_student(DIVERGENCE):
    """Return whether a divergence is KL(p_s || m) alone."""
    return DIVERGENCE in (REVERSE.value, SKEW_REVERSE.value)


@triton.jit
def row_numbers(reverse_weight_ptr, row, c, DIVERGENCE: tl.constexpr):
    """Return a, b, c, 1 - c and k of `fused_distill_kernels.elementwise.divergence_terms` in one row."""
    rest = 1.0 - c
    if DIVERGENCE == MIXTURE:
        return c, rest, c, rest, c * 0.0
    b = c * 0.0
    if DIVERGENCE == MIXED:
        b = tl.load(reverse_weight_ptr + row).to(tl.float64)
    elif is_of_student(DIVERGENCE):
        b = b + 1.0
    a = 1.0 - b
    return a, b, c, rest, a * rest - b * c if is_mixture(DIVERGENCE) else a - b


@triton.jit
def outcome_terms(p_s, p_t, d, numbers, clip, DIVERGENCE: tl.constexpr, CLIP: tl.constexpr):
    """Return the derivative of each outcome's term by log p_s, plus k p_s, and the term less k (p_t - p_s).

    The sum of p_t - p_s is 0, and k p_s has no effect on the gradient through a softmax.
    """
    a, b, c, rest, k = numbers
    prob_diff = stable_prob_diff(p_s, p_t, d)
    if DIVERGENCE == TOTAL_VARIATION:
        term, k = 0.5 * tl.abs(prob_diff), 0.0
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0 * prob_diff))  # keeps NaN
        slope = -0.5 * p_s * sign
    elif is_mixture(DIVERGENCE):
        u, v = mixture_log_ratios(d, c, rest)
        term = a * kl_terms(p_t, v, -rest * prob_diff) + b * kl_terms(p_s, u, c * prob_diff)
        slope = -b * mul_zero_safe(p_s, u) - k * (p_s * expm1(-v))
    else:
        forward, reverse = kl_terms(p_t, -d, -prob_diff), kl_terms(p_s, d, prob_diff)
        term = mul_zero_safe(a, forward) + mul_zero_safe(b, reverse)  # a weight of 0 drops an infinite term
        slope = mul_zero_safe(b * p_s, -d) - a * prob_diff
    if CLIP:
        bound = clip - k * prob_diff
        slope = tl.where(term > bound, k * p_s, slope)
        term = tl.where(term > bound, bound, term)  # keeps NaN
    return slope, term


@triton.jit
def jsd_terms(p_s, p_t, d, beta, one_minus_beta, DIVERGENCE: tl.constexpr, IS_DIVERGENCE: tl.constexpr):
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
def jsd_log_prob_gradient(p_s, p_t, d, beta, one_minus_beta, DIVERGENCE: tl.constexpr):
    """Return the derivative of the loss by each outcome's log p_s."""
    if DIVERGENCE == FORWARD:
        gradient = -p_t
    elif DIVERGENCE == REVERSE:
        gradient = mul_zero_safe(p_s, 1.0 - d)
    else:
        u, _ = mixture_log_ratios(d, beta, one_minus_beta)
        gradient = one_minus_beta * mul_zero_safe(p_s, -u)
    return gradient


@triton.constexpr_function
def is_jsd(DIVERGENCE, CLIP):
    """Return whether the sums of a row are those of `jsd_terms`, and not those of `outcome_terms`."""
    return not CLIP and DIVERGENCE in (FORWARD.value, REVERSE.value, MIXTURE.value)


@triton.jit
def summed_terms(
    p_s,
    p_t,
    d,
    numbers,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
    IS_DIVERGENCE: tl.constexpr,
):
    """Return the two numbers of each outcome whose sums give loss and gradient."""
    if is_jsd(DIVERGENCE, CLIP):
        return jsd_terms(p_s, p_t, d, numbers[2], numbers[3], DIVERGENCE, IS_DIVERGENCE)
    return outcome_terms(p_s, p_t, d, numbers, clip, DIVERGENCE, CLIP)


@triton.jit
def log_prob_gradient(p_s, p_t, d, numbers, clip, DIVERGENCE: tl.constexpr, CLIP: tl.constexpr):
    """Return the derivative of the loss by each outcome's log p_s."""
    if is_jsd(DIVERGENCE, CLIP):
        return jsd_log_prob_gradient(p_s, p_t, d, numbers[2], numbers[3], DIVERGENCE)
    return outcome_terms(p_s, p_t, d, numbers, clip, DIVERGENCE, CLIP)[0]
