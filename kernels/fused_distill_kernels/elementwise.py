"""Elementwise formulas of the row kernels in float32, accurate where the two models are close.

They compute the same terms as the functions of the same names in `fused_distill.rows.elementwise`, which
explains them. They work on one tile in registers and touch no memory, except `load_logits`. expm1, log1p and
tanh are written out because Triton's interpreter cannot call libdevice.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

TAYLOR_RADIUS = tl.constexpr(0.5)


@triton.jit
def taylor_remainder(x):
    """Return (e^x - 1 - x) / x^2 for |x| < TAYLOR_RADIUS, by 8 terms of its Taylor polynomial."""
    value = 2.4801587302e-5 + x * 2.7557319224e-6
    value = 1.9841269841e-4 + x * value
    value = 1.3888888889e-3 + x * value
    value = 8.3333333333e-3 + x * value
    value = 4.1666666667e-2 + x * value
    value = 1.6666666667e-1 + x * value
    return 0.5 + x * value


@triton.jit
def expm1(x):
    """Return e^x - 1 for x <= 0."""
    return tl.where(x > -TAYLOR_RADIUS, x + x * x * taylor_remainder(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Return log(1 + x) for x > -1, near zero as 2 artanh(x / (2 + x)), because 1 + x would round."""
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
    """Return the hyperbolic tangent, accurate near zero."""
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def mul_zero_safe(p, x):
    """Return p x, and 0 where p is 0 even if x is infinite."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def exp_sub_max(z, max_logit):
    """Return e^(z - max_logit) for z <= max_logit, and 0 where z is -inf, even if max_logit is -inf too."""
    return tl.where(z == float("-inf"), 0.0, tl.exp(z - max_logit))


@triton.jit
def log_gap(z_s, z_t):
    """Return z_t - z_s, and 0 where both are the same infinity."""
    return tl.where(z_s == z_t, 0.0, z_t - z_s)


@triton.jit
def stable_prob_diff(a, b, log_ratio):
    """Return b - a for a, b >= 0, given log_ratio = log(b / a)."""
    return tl.where(log_ratio > 0, -b, a) * expm1(-tl.abs(log_ratio))


@triton.jit
def kl_terms(p, x, prob_diff):
    """Return p (e^x - 1 - x) >= 0, the terms of KL(p || m) with x = log m - log p and prob_diff = m - p."""
    far = prob_diff - mul_zero_safe(p, x)
    far = tl.where(far < 0, 0.0, far)  # keeps NaN, as tl.maximum does not
    return tl.where(tl.abs(x) < TAYLOR_RADIUS, p * (x * x) * taylor_remainder(x), far)


@triton.jit
def mixture_log_ratios(d, beta, one_minus_beta):
    """Return log m - log p_s and log m - log p_t for m = beta p_t + (1 - beta) p_s."""
    toward_larger = log1p(tl.where(d > 0, one_minus_beta, beta) * expm1(-tl.abs(d)))
    toward_smaller = toward_larger + tl.abs(d)
    return tl.where(d > 0, toward_smaller, toward_larger), tl.where(d > 0, toward_larger, toward_smaller)


@triton.jit
def lse_difference(max_s, max_t, sum_s, sum_t, diff_sum):
    """Return c = lse_t - lse_s with an error that shrinks with the distance between the models.

    diff_sum is the sum of e^(z_t - m) - e^(z_s - m) with m the larger of the two maxima.
    """
    excess = diff_sum / (sum_s * tl.exp(max_s - tl.maximum(max_s, max_t)))
    plain = (max_t - max_s) + (tl.log(sum_t) - tl.log(sum_s))
    return tl.where(tl.abs(excess) < 0.5, log1p(excess), plain)


@triton.jit
def transform_logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return softcap * tanh(scale * x / softcap) and its derivative with respect to x."""
    y = x * scale
    dlogit_dproj = tl.full(y.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        t = tanh(y / softcap)
        y = softcap * t
        dlogit_dproj = scale * (1.0 - t * t)
    return y, dlogit_dproj


@triton.jit
def load_logits(
    row_ptr, bias_ptr, columns, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return one tile of logits, and their derivative with respect to the projection.

    Logits are -inf outside the vocabulary, and where the projection is -inf: the caller has excluded these.
    """
    x = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
    inside = x != float("-inf")
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    y, dlogit_dproj = transform_logits(x, scale, softcap, HAS_SOFTCAP)
    return tl.where(inside, y, float("-inf")), dlogit_dproj
