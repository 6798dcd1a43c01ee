"""Elementwise formulas of the K + 1 outcomes of a top-k teacher, in float64.

They compute the same terms as the functions of the same names in `fused_distill.rows.elementwise`, which
explains them. float64 is for the differences: of a logit and a log-sum-exp, of the two models'
log-probabilities. Relative errors of 1e-10 are allowed, as results are rounded to float32.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

from .elementwise import exp_sub_max, mul_zero_safe

# Below it 5 terms of the Taylor polynomial of e^x - 1 - x are as good as the plain difference is above it.
TAYLOR_RADIUS = tl.constexpr(0.03)


@triton.jit
def from_parts(high, low):
    """Return a float64 option that was passed as two float32 numbers, as kernels take no float64 scalars."""
    return tl.full([], 0.0, tl.float64) + high + low


@triton.jit
def log_gap(z_s, z_t):
    """Return z_t - z_s, and 0 where both are the same infinity."""
    return tl.where(z_s == z_t, 0.0, z_t - z_s)


@triton.jit
def taylor_remainder(x):
    """Return (e^x - 1 - x) / x^2 for |x| < TAYLOR_RADIUS."""
    return 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))


@triton.jit
def expm1(x):
    """Return e^x - 1."""
    return tl.where(tl.abs(x) < TAYLOR_RADIUS, x + x * x * taylor_remainder(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Return log(1 + x) for x > -1; log(u) x / (u - 1) is accurate although u = 1 + x is rounded."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def logaddexp(a, b):
    """Return log(e^a + e^b)."""
    larger = tl.maximum(a, b)
    return larger + tl.log(exp_sub_max(a, larger) + exp_sub_max(b, larger))


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent with a small absolute error."""
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


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
def transform_logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return softcap * tanh(scale * x / softcap)."""
    y = x * scale
    if HAS_SOFTCAP:
        y = softcap * tanh(y / softcap)
    return y


@triton.jit
def transform_derivative(y, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the derivative of `transform_logits` by x where its result is y."""
    if HAS_SOFTCAP:
        t = y / softcap
        scale = scale * (1.0 - t * t)
    return scale
