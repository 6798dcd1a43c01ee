"""Elementwise formulas of the row kernels in float32, accurate where the two models are close.

They compute the same terms as the functions of the same names in `fused_distill.rows.elementwise`, which
explains them. They work on one tile in registers and touch no memory. Logarithms and tanh are written out
because Triton's interpreter cannot call libdevice.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

import triton
import triton.language as tl

# The row arithmetic that a divergence takes, by the numbers of `fused_distill.config.DivergenceForm`.
FORWARD, REVERSE, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SKEW_REVERSE, MIXED, TOTAL_VARIATION = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)

TAYLOR_RADIUS = tl.constexpr(0.5)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.9259630335e-8)  # the rest of LOG2_E, whose rounding a sum of exponentials keeps
LN_2 = tl.constexpr(0.6931471805599453)
TANH_RADIUS = tl.constexpr(0.0625)  # of the polynomial in `tanh_difference`


@triton.jit
def exp(x):
    """Return e^x by the hardware's base-2 exponential."""
    return tl.math.exp2(x * LOG2_E)


@triton.jit
def taylor_remainder(x):
    """Return (e^x - 1 - x) / x^2 for |x| < TAYLOR_RADIUS, by a polynomial fitted to it."""
    value = 1.3975331094e-3 + x * 1.9863351190e-4
    value = 8.3334799856e-3 + x * value
    value = 4.1666001081e-2 + x * value
    value = 1.6666665673e-1 + x * value
    return 0.5 + x * value


@triton.jit
def log_ratio(p, q, difference):
    """Return log(q / p) and (q / p - 1) - log(q / p), given the difference q - p without cancellation."""
    x = difference / p
    s = x / (2.0 + x)  # log(1 + x) = 2 artanh(s)
    square = s * s
    series = 0.1538461538 * square + 0.1818181818
    series = 0.2222222222 + square * series
    series = 0.2857142857 + square * series
    series = 0.4 + square * series
    series = square * (0.6666666667 + square * series)
    near = tl.abs(x) < 0.5
    far = tl.log(q / p)
    return tl.where(near, s * (2.0 + series), far), tl.where(near, s * (x - series), x - far)


@triton.jit
def log1p_remainder(w):
    """Return w - log(1 + w) for -0.5 <= w <= 0, by a polynomial fitted to it."""
    value = 1.29892866 * w + 1.514632781
    value = value * w + 1.109715951
    value = value * w + 0.1801717445
    value = value * w + 0.2265634071
    value = value * w - 0.1939088243
    value = value * w + 0.2503050973
    value = value * w - 0.3333275279
    value = value * w + 0.500000018
    return value * (w * w)


@triton.jit
def log_remainder(w, total):
    """Return w - log(1 + w) for -1 < w <= 0, given total = 1 + w without cancellation.

    Below w = -0.5 the polynomial is evaluated at the mantissa of total, and its exponent is added.
    """
    near = w > -0.5
    bits = total.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [0.5, 1)
    exponent = ((bits >> 23) - 126).to(tl.float32)
    x = tl.where(near, w, mantissa - 1.0)
    return log1p_remainder(x) + tl.where(near, 0.0, (w - x) - exponent * LN_2)


@triton.jit
def tanh(x, scale):
    """Return tanh(scale * x) with an absolute error of float32 rounding.

    The inverse square root of a square is the cheapest reciprocal.
    """
    total = 1.0 + tl.math.exp2(x * (scale * (-2.0 * LOG2_E)))
    return 2.0 * tl.math.rsqrt(total * total) - 1.0


@triton.jit
def tanh_difference(tanh_a, tanh_b, difference):
    """Return tanh(a) - tanh(b), given difference = a - b.

    If it is small, by the identity tanh(a) - tanh(b) = tanh(a - b) (1 - tanh(a) tanh(b)), which does not
    cancel.
    """
    square = difference * difference
    small = difference * (1.0 + square * (-0.3333333333 + square * 0.1333333333))
    near = tl.abs(difference) < TANH_RADIUS
    return tl.where(near, small * (1.0 - tanh_a * tanh_b), tanh_a - tanh_b)


@triton.jit
def mul_zero_safe(p, x):
    """Return p x, and 0 where p is 0 even if x is infinite."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def exp_sub_max(z, max_logit):
    """Return e^(z - max_logit) for z <= max_logit, and 0 where z is -inf, even if max_logit is -inf too."""
    x = z - max_logit
    if x.dtype == tl.float64:  # noqa: SIM108
        e = tl.exp(x)
    else:
        e = tl.math.exp2(x * LOG2_E + x * LOG2_E_LOW)
    return tl.where(z == float("-inf"), 0.0, e)


@triton.jit
def pair_terms(p, q, x):
    """Return q - p, p (e^x - 1 - x) and q (e^-x - 1 + x) for p, q >= 0, given x = log(q / p).

    The last two are >= 0, the terms of KL(p || q) and KL(q || p). If p is 0 they are q and 0, or infinity if
    q is not 0; likewise for q. The bounds on x matter only where p or q is 0, and `maximum` drops NaN. Near
    x = 0 the last is computed as (q - p) x less the second, which is half of it.
    """
    near = tl.abs(x) < TAYLOR_RADIUS
    kl_p = p * ((x * x) * taylor_remainder(x))
    near_difference, difference = p * x + kl_p, q - p
    return (
        tl.where(near, near_difference, difference),
        tl.where(near, kl_p, tl.maximum(difference - p * tl.minimum(x, 1000.0), 0.0)),
        tl.where(near, near_difference * x - kl_p, tl.maximum(q * tl.maximum(x, -1000.0) - difference, 0.0)),
    )


@triton.jit
def stable_prob_diff(a, b, log_ratio):
    """Return b - a for a, b >= 0, given log_ratio = log(b / a)."""
    x = -log_ratio
    return tl.where(tl.abs(x) < TAYLOR_RADIUS, -b * (x + (x * x) * taylor_remainder(x)), b - a)


@triton.jit
def mixture_terms(d, beta, one_minus_beta, HALF: tl.constexpr):
    """Return what the terms of KL(. || m) share, for m = beta p_t + (1 - beta) p_s and d = log p_t - log p_s.

    With p the smaller and q the larger of the two probabilities and k the weight of p in the mixture,
    m / q = 1 + w with w = k (p / q - 1). HALF: beta is 0.5, so that w >= -0.5 and no logarithm is needed.

    Returns:
        teacher_leads: d > 0, so that q is the teacher's.
        distance: |d|, bounded so that its product with a probability of 0 is 0.
        w: in [-1, 0].
        remainder: w - log(1 + w), which is >= 0.
        excess: m / q - p / q, the part of the mixture beyond p.
        ratio: p / q - 1.
        total: m / q.
    """
    teacher_leads = d > 0
    distance = tl.minimum(tl.abs(d), 1000.0)
    x = -distance
    exp_x = exp(x)
    ratio = tl.where(distance < TAYLOR_RADIUS, x + x * x * taylor_remainder(x), exp_x - 1.0)
    if HALF:
        w = 0.5 * ratio
        return teacher_leads, distance, w, log1p_remainder(w), -w, ratio, 1.0 + w
    share, rest = tl.where(teacher_leads, one_minus_beta, beta), tl.where(teacher_leads, beta, one_minus_beta)
    w, total = share * ratio, rest + share * exp_x
    return teacher_leads, distance, w, log_remainder(w, total), -rest * ratio, ratio, total


@triton.jit
def mixture_kl_terms(p_s, p_t, d, beta, one_minus_beta, HALF: tl.constexpr):
    """Return the terms of KL(p_s || m) and KL(p_t || m), which are >= 0, p_t - p_s, and its square over m."""
    teacher_leads, distance, w, remainder, excess, ratio, total = mixture_terms(d, beta, one_minus_beta, HALF)
    larger, smaller = tl.maximum(p_s, p_t), tl.minimum(p_s, p_t)
    x = (w - remainder) + distance  # log m - log of the smaller probability
    far = tl.maximum(larger * excess - smaller * x, 0.0)
    kl_smaller = tl.where(x < TAYLOR_RADIUS, smaller * (x * x) * taylor_remainder(x), far)
    kl_larger = larger * remainder
    lead = larger * -ratio
    return (
        tl.where(teacher_leads, kl_smaller, kl_larger),
        tl.where(teacher_leads, kl_larger, kl_smaller),
        tl.where(teacher_leads, lead, -lead),
        lead * (-ratio / total),
    )


@triton.constexpr_function
def is_mixture(DIVERGENCE):
    """Return whether a divergence compares with a mixture of the models, and not with one of them."""
    return MIXTURE.value <= DIVERGENCE <= SKEW_REVERSE.value


@triton.jit
def divergence_terms(p_s, p_t, d, numbers, DIVERGENCE: tl.constexpr, HALF: tl.constexpr):
    """Return what losses and their gradients add up, for a KL(p_t || m) + b KL(p_s || m).

    numbers are a, b, the teacher's and the student's share of m, and `Mixture.imbalance`, k. Of the two plain
    KL divergences a and b are the weights, and k is a - b.

    Returns:
        term: >= 0, the loss's term less k (p_t - p_s), whose sum is 0.
        centre: adds up to the sum of `slope`, without its first-order terms, whose sum is 0.
        difference: p_t - p_s.
    """
    a, b, c, rest, k = numbers
    if is_mixture(DIVERGENCE):
        kl_s, kl_t, difference, square = mixture_kl_terms(p_s, p_t, d, c, rest, HALF)
        return a * kl_t + b * kl_s, b * kl_s + (k * rest * c) * square, difference
    difference, kl_s, kl_t = pair_terms(p_s, p_t, d)
    kl_s = mul_zero_safe(b, kl_s)  # a weight of 0 drops an infinite term
    return mul_zero_safe(a, kl_t) + kl_s, kl_s, difference


@triton.jit
def slope(p_s, p_t, d, numbers, DIVERGENCE: tl.constexpr, HALF: tl.constexpr):
    """Return the derivative of a term by log p_s, plus k p_s; see `divergence_terms`."""
    a, b, c, rest, k = numbers
    if is_mixture(DIVERGENCE):
        leads, distance, w, remainder, _, ratio, total = mixture_terms(d, c, rest, HALF)
        u = tl.where(leads, (w - remainder) + distance, w - remainder)
        excess = (k * rest) * (ratio / total)  # of the probability ratio p_t / m or p_s / m over 1
        return p_s * (tl.where(leads, excess, -excess) - b * u)
    return a * stable_prob_diff(p_t, p_s, -d) + mul_zero_safe(b * p_s, -d)


@triton.jit
def clipped(p_s, numbers, clip, terms, DIVERGENCE: tl.constexpr):
    """Return `divergence_terms`, where a term of the loss is at most `clip`, and whether it is clipped."""
    _, b, c, rest, k = numbers
    term, centre, difference = terms
    bound = clip - k * difference
    is_clipped = term > bound
    by_difference = 1.0
    if is_mixture(DIVERGENCE):
        by_difference = b * c + k * rest
    return (
        tl.minimum(term, bound),
        tl.where(is_clipped, k * p_s + by_difference * difference, centre),
        is_clipped,
    )


@triton.jit
def variation_terms(p_s, p_t, d, clip, CLIP: tl.constexpr):
    """Return the loss's terms of 0.5 sum |p_t - p_s|, where the teacher leads, and where the slope is 0.

    It is 0 where a term is clipped, and where the models are equal. Unclipped, the loss is the sum of
    p_s - p_t where the teacher does not lead, because both signs of the difference have the same sum.
    """
    leads, flat = d > 0, d == 0
    x = -tl.abs(d) if CLIP else tl.minimum(d, 0.0)
    near = -x * (
        1.0 + x * (4.9999710917e-1 + x * (1.6652604938e-1 + x * 3.9715882391e-2))
    )  # fitted to 1 - e^x
    gap = tl.where(x > -0.125, near, 1.0 - exp(x))
    if CLIP:
        half = 0.5 * tl.maximum(p_s, p_t) * tl.minimum(gap, 1.0)  # `minimum` drops NaN
        return tl.minimum(half, clip), leads, flat | (half > clip)
    return p_s * gap, leads, flat


@triton.jit
def transform_logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return softcap * tanh(scale * x / softcap) and its derivative with respect to x."""
    y = x * scale
    dlogit_dproj = tl.full(y.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        t = tanh(y, 1.0 / softcap)
        y = softcap * t
        dlogit_dproj = scale * tl.maximum(1.0 - t * t, 0.0)
    return y, dlogit_dproj
