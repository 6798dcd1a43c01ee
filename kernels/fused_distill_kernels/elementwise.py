"""Device helpers shared by the row kernels: elementwise functions that do not cancel near zero, in float32.

They mirror the PyTorch row arithmetic of `fused_distill._rows` term by term.
"""

import triton
import triton.language as tl

SERIES_RADIUS = tl.constexpr(0.5)


@triton.jit
def series(x):
    """(e^x - 1 - x) / x^2 for |x| < SERIES_RADIUS: Taylor, 8 terms."""
    value = 2.4801587302e-5 + x * 2.7557319224e-6
    value = 1.9841269841e-4 + x * value
    value = 1.3888888889e-3 + x * value
    value = 8.3333333333e-3 + x * value
    value = 4.1666666667e-2 + x * value
    value = 1.6666666667e-1 + x * value
    return 0.5 + x * value


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0."""
    return tl.where(x > -SERIES_RADIUS, x + x * x * series(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1: 2 artanh(x / (2 + x)) near zero, where 1 + x would round."""
    s = x / (2.0 + x)
    square = s * s
    value = 0.1538461538 * square + 0.1818181818
    value = 0.2222222222 + square * value
    value = 0.2857142857 + square * value
    value = 0.4 + square * value
    value = 0.6666666667 + square * value
    value = 2.0 + square * value
    return tl.where(tl.abs(x) < 0.5, s * value, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, accurate near zero."""
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def times(p, x):
    """p x, and 0 where p is 0 however infinite x is."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def exp_below(x, top):
    """exp(x - top) for x <= top, 0 where x is -inf."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - top))


@triton.jit
def log_gap(z_s, z_t):
    """z_t - z_s, and 0 where both are the same infinity."""
    return tl.where(z_s == z_t, 0.0, z_t - z_s)


@triton.jit
def signed_gap(a, b, log_ratio):
    """b - a for positive a and b, given log(b / a)."""
    return tl.where(log_ratio > 0, -b, a) * expm1(-tl.abs(log_ratio))


@triton.jit
def kl_terms(p, x, gap):
    """p (e^x - 1 - x), the terms of KL(p || m) with x = log m - log p and gap = m - p. Never negative."""
    far = gap - times(p, x)
    far = tl.where(far < 0, 0.0, far)  # keeps NaN, as tl.maximum does not
    return tl.where(tl.abs(x) < SERIES_RADIUS, p * (x * x) * series(x), far)


@triton.jit
def mixture_log_ratios(d, beta, one_minus_beta):
    """log m - log p_s and log m - log p_t for m = beta p_t + (1 - beta) p_s, with d = log p_t - log p_s."""
    toward_larger = log1p(tl.where(d > 0, one_minus_beta, beta) * expm1(-tl.abs(d)))
    toward_smaller = toward_larger + tl.abs(d)
    return tl.where(d > 0, toward_smaller, toward_larger), tl.where(d > 0, toward_larger, toward_smaller)


@triton.jit
def load_logits(
    row_ptr, bias_ptr, columns, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """One tile of logits (bias, scale, softcap applied), and their slope by the projection.

    Columns outside and columns whose projection is -inf, excluded by the caller, have -inf.
    """
    x = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
    inside = x != float("-inf")
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    y = x * scale
    slope = tl.full(y.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        t = tanh(y / softcap)
        y = softcap * t
        slope = scale * (1.0 - t * t)
    return tl.where(inside, y, float("-inf")), slope
