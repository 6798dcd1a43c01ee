"""Statistics of the columns that a thread has seen so far, while it loops over a row.

A running part is (offset, power), and the first 11 fields of a part (row_statistics.py). Its exponentials are
p = 2^(factor log2(e) v_s - power) and q = 2^(factor log2(e) (v_t - offset) - power), so that one operation
gives an exponent. The power is an integer and the offset has few binary digits: no digits of logits are lost.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2_E, exp, pair_terms
from .tile import LOWEST, gap_beyond, offset_between

ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23, whose addition rounds a number to an integer
REACH = tl.constexpr(0.5)  # by which the offset may be wrong


@triton.jit
def empty_part(factor, GROUPS: tl.constexpr):
    """Return the running parts of groups that have seen no columns; see `raised`."""
    zero = tl.zeros([GROUPS], tl.float32)
    lowest = zero + LOWEST
    reference = zero, rounded_power(lowest, factor)
    return reference, (lowest, lowest, zero, zero, zero, zero, zero, zero, zero, lowest, zero)


@triton.jit
def rounded_power(v, factor):
    """Return the integer closest to factor * v * log2(e); differences of integers are exact."""
    return tl.fma(v, factor * LOG2_E, ROUNDING) - ROUNDING


@triton.jit
def rescaled(
    part,
    growth,  # by which powers of 2 the student's and the teacher's exponentials grow
    terms,  # `pair_terms` of the two powers of 2
    want,  # flags: reverse, forward, statistics, y
):
    """Return parts whose exponentials are multiplied, but sum_y."""
    max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    want_reverse, want_forward, want_stats, _ = want
    power_s, power_t = growth
    scale_s, scale_t = tl.math.exp2(power_s), tl.math.exp2(power_t)
    d, kl_s, kl_t = terms
    if want_reverse:  # `maximum` drops the NaN of 0 times infinity
        reverse = tl.maximum(scale_s * reverse, 0.0) + (d * difference + kl_s * sum_s)
    if want_forward:
        forward = tl.maximum(scale_t * forward, 0.0) + (d * difference + kl_t * sum_t)
    if want_stats:
        moment_s = scale_s * (moment_s + power_s * sum_s)
        moment_t = scale_t * (moment_t + power_t * sum_t)
    difference = scale_s * difference + d * sum_t
    sum_s, sum_t = scale_s * sum_s, scale_t * sum_t
    return max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y


@triton.jit
def raised(
    running,
    top_s,
    top_t,
    factor,
    label_factor,
    want,  # flags: reverse, forward, statistics, y
):
    """Return the groups' running parts, whose maxima are those of their own and the given ones.

    The exponentials of a running part are those of `powers`. Their two references differ by the offset
    alone, which changes only if the maxima have moved away from it by REACH. So a new reference mostly
    multiplies all sums by one power of 2.
    """
    references, part = running
    old_offset, old_power = references
    old_s, old_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    max_s, max_t = tl.maximum(old_s, top_s), tl.maximum(old_t, top_t)
    is_far = (tl.abs((max_t - old_offset) - max_s) * factor > REACH) | (old_s == LOWEST)
    offset = tl.where(is_far, offset_between(max_s, max_t, factor), old_offset)
    power = rounded_power(tl.maximum(max_s, max_t - offset), factor)
    power_s = old_power - power
    power_t = tl.fma(old_offset - offset, factor * LOG2_E, power_s)
    if want[2]:  # a column of before is no longer the most likely one of both models
        top = tl.where((max_s > old_s) | (max_t > old_t), LOWEST, top)
    if want[3]:
        sum_y *= exp((old_s - max_s) * label_factor)
    # As REACH is not small, the terms need no formula for close numbers. They are 0 if the offset is kept.
    scale_s, scale_t, x = tl.math.exp2(power_s), tl.math.exp2(power_t), (old_offset - offset) * factor
    d = scale_t - scale_s
    terms = d, d - scale_s * x, scale_t * x - d
    part = max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y
    return (offset, power), rescaled(part, (power_s, power_t), terms, want)


@triton.jit
def powers(v_s, v_t_less_offset, power, factor):
    """Return the logarithms to base 2 of the two models' exponentials relative to a reference."""
    exp_factor = factor * LOG2_E
    return tl.fma(v_s, exp_factor, -power), tl.fma(v_t_less_offset, exp_factor, -power)


@triton.jit
def accumulate(
    running,
    pair,  # of `load_pair`
    factor,
    label_factor,
    want,  # flags: reverse, forward, statistics, y
    TRANSFORM: tl.constexpr,
):
    """Add columns to the groups' running parts, whose maxima are at least theirs.

    The parts' KL divergences are not normalised yet; see `normalised`.
    """
    v_s, v_t, extra, _ = pair
    references, part = running
    offset, power = references
    max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    want_reverse, want_forward, want_stats, want_y = want
    v_t_less_offset = v_t - offset[:, None]
    power_s, power_t = powers(v_s, v_t_less_offset, power[:, None], factor)
    p, q = tl.math.exp2(power_s), tl.math.exp2(power_t)
    sum_s += tl.sum(p, 1)
    sum_t += tl.sum(q, 1)
    if want_stats:
        top = tl.maximum(top, tl.max(power_s + power_t, 1))
        moment_s += tl.sum(p * tl.maximum(power_s, LOWEST), 1)
        moment_t += tl.sum(q * tl.maximum(power_t, LOWEST), 1)
    if want_y:
        sum_y += tl.sum(exp((v_s - max_s[:, None]) * label_factor), 1)
    d, kl_s, kl_t = pair_terms(
        p, q, gap_beyond(v_s, v_t_less_offset, extra, offset[:, None], TRANSFORM) * factor
    )
    difference += tl.sum(d, 1)
    if want_reverse:
        reverse += tl.sum(kl_s, 1)
    if want_forward:
        forward += tl.sum(kl_t, 1)
    part = max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y
    return (offset, power), part


@triton.jit
def relative_to_maxima(running, factor, want):
    """Return the parts whose exponentials are relative to each model's maximum."""
    references, part = running
    offset, power = references
    max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    max_t_less_offset = max_t - offset
    power_s, power_t = powers(max_s, max_t_less_offset, power, factor)
    top = tl.where(top == LOWEST, LOWEST, top - (power_s + power_t))
    # In a part where one model has no logit, both are multiplied by the same number.
    is_empty = (max_s == LOWEST) | (max_t == LOWEST)
    common = tl.minimum(tl.maximum(tl.maximum(power_s, power_t), -1.0), 1.0)
    power_s, power_t = -tl.where(is_empty, common, power_s), -tl.where(is_empty, common, power_t)
    x = tl.where(is_empty, 0.0, (max_s - max_t_less_offset) * factor)
    terms = pair_terms(tl.math.exp2(power_s), tl.math.exp2(power_t), x)
    part = max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y
    return rescaled(part, (power_s, power_t), terms, want)
