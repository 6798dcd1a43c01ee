"""Row kernels of the generalized Jensen-Shannon divergence over a chunk of float32 logits.

    statistics_kernel, merge_kernel   softmaxes, KL divergences and entropies; see row_statistics.py
    mixture_sums_kernel               KL(student || mixture) and KL(teacher || mixture), for 0 < beta < 1
    gradient_kernel                   the logit gradient

All but merge_kernel run on a grid of (rows, parts): one program loops over every n_parts-th tile of one row.
beta = 0 and beta = 1 take two passes over the logits, other values three.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2_E, TAYLOR_RADIUS, exp, mixture_terms, mul_zero_safe, taylor_remainder
from .row_statistics import (
    LSE_DIFFERENCE,
    MAX_S,
    MAX_T,
    PART,
    REVERSE_KL,
    SUM_S,
    SUM_T,
    SUM_Y,
)
from .tile import WIDTH, gap_beyond, load_pair, rest_of_part, tile_columns

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
MIXTURE = tl.constexpr(2)


@triton.jit
def softmax_parts(row_ptr):
    """Return the numbers of a row that `distributions` needs."""
    inverse_s, inverse_t = 1.0 / tl.load(row_ptr + SUM_S), 1.0 / tl.load(row_ptr + SUM_T)
    max_s, max_t = tl.load(row_ptr + MAX_S), tl.load(row_ptr + MAX_T)
    return max_s, max_t, inverse_s, inverse_t, tl.load(row_ptr + LSE_DIFFERENCE)


@triton.jit
def distributions(pair, softmax, factor, TRANSFORM: tl.constexpr):
    """Return p_s, p_t and d = log p_t - log p_s of one tile, given its `load_pair`."""
    v_s, v_t, extra, _ = pair
    max_s, max_t, inverse_s, inverse_t, lse_difference = softmax
    exp_factor = factor * LOG2_E
    p_s = tl.math.exp2((v_s - max_s) * exp_factor) * inverse_s
    p_t = tl.math.exp2((v_t - max_t) * exp_factor) * inverse_t
    return p_s, p_t, gap_beyond(v_s, v_t, extra, max_s, max_t, TRANSFORM) * factor - lse_difference


@triton.jit
def mixture_sums(pair, softmax, factor, beta, one_minus_beta, TRANSFORM: tl.constexpr, HALF: tl.constexpr):
    """Return the groups' sums of the terms of KL(s || m) and KL(t || m), all >= 0."""
    p_s, p_t, d = distributions(pair, softmax, factor, TRANSFORM)
    teacher_leads, distance, w, remainder, excess = mixture_terms(d, beta, one_minus_beta, HALF)
    larger, smaller = tl.maximum(p_s, p_t), tl.minimum(p_s, p_t)
    x = (w - remainder) + distance  # log m - log of the smaller probability
    far = tl.maximum(larger * excess - smaller * x, 0.0)
    kl_smaller = tl.where(x < TAYLOR_RADIUS, smaller * (x * x) * taylor_remainder(x), far)
    kl_larger = larger * remainder
    return (
        tl.sum(tl.where(teacher_leads, kl_smaller, kl_larger), 1),
        tl.sum(tl.where(teacher_leads, kl_larger, kl_smaller), 1),
    )


@triton.jit
def mixture_sums_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32 or None
    teacher_bias_ptr,  # (V,) float32 or None
    merged_ptr,  # (n, PART) float32
    sums_ptr,  # (n, 2, n_parts) float32, written
    n_columns,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    factor,
    beta,
    one_minus_beta,
    TRANSFORM: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum the terms of KL(student || mixture) and KL(teacher || mixture) over one part of one row.

    Reads 8 bytes per column, and 4 more per bias. Writes 8 bytes per part.
    """
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_parts = tl.num_programs(1)
    pointers = (
        student_ptr + row * student_stride,
        teacher_ptr + row * teacher_stride,
        student_bias_ptr,
        teacher_bias_ptr,
    )
    transform = (student_scale, teacher_scale, student_softcap, teacher_softcap)
    softmax = softmax_parts(merged_ptr + row * PART)
    lanes = tile_columns(GROUPS, WIDTH)
    half: tl.constexpr = GROUPS * WIDTH
    block: tl.constexpr = 2 * half
    kl_s = tl.zeros([GROUPS], tl.float32)
    kl_t = tl.zeros([GROUPS], tl.float32)

    for tile in range(index, n_columns // block, n_parts):
        columns = tile * block + lanes
        one = load_pair(pointers, columns, n_columns, transform, TRANSFORM, False)
        two = load_pair(pointers, columns + half, n_columns, transform, TRANSFORM, False)
        one_s, one_t = mixture_sums(one, softmax, factor, beta, one_minus_beta, TRANSFORM, HALF)
        two_s, two_t = mixture_sums(two, softmax, factor, beta, one_minus_beta, TRANSFORM, HALF)
        kl_s += one_s + two_s
        kl_t += one_t + two_t
    first, stop = rest_of_part(index, n_parts, n_columns, block, half)
    for tile in range(first, stop):
        pair = load_pair(pointers, tile * half + lanes, n_columns, transform, TRANSFORM, True)
        s, t = mixture_sums(pair, softmax, factor, beta, one_minus_beta, TRANSFORM, HALF)
        kl_s += s
        kl_t += t

    out = sums_ptr + row * (2 * n_parts) + index
    invalid = tl.load(merged_ptr + row * PART + LSE_DIFFERENCE) * 0.0  # NaN logits are lost by tl.maximum
    tl.store(out, tl.sum(kl_s, 0) + invalid)
    tl.store(out + n_parts, tl.sum(kl_t, 0) + invalid)


@triton.jit
def logit_gradient(
    pair,
    softmax,
    factor,
    kl,
    beta,
    one_minus_beta,
    TRANSFORM: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return the divergence's gradient with respect to the student's z, over 1 - beta for a mixture."""
    p_s, p_t, d = distributions(pair, softmax, factor, TRANSFORM)
    if DIVERGENCE == FORWARD:
        return tl.where(tl.abs(d) < TAYLOR_RADIUS, -p_s * (d + (d * d) * taylor_remainder(d)), p_s - p_t)
    if DIVERGENCE == REVERSE:
        return mul_zero_safe(p_s, -kl - d)
    teacher_leads, distance, w, remainder, _ = mixture_terms(d, beta, one_minus_beta, HALF)
    return p_s * ((remainder - w) - tl.where(teacher_leads, distance + kl, kl))


@triton.jit(do_not_specialize_on_alignment=["weight_ptr", "labels_ptr"])
def gradient_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32 or None
    teacher_bias_ptr,  # (V,) float32 or None
    merged_ptr,  # (n, PART) float32
    kl_ptr,  # (n, ...) float32: KL(student || mixture)
    kl_stride,
    grad_ptr,  # (n, V), written; may be student_ptr
    grad_stride,
    weight_ptr,  # (n,) float32
    labels_ptr,  # (n,) int64 or None
    n_columns,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    factor,
    label_factor,
    beta,
    one_minus_beta,
    soft_factor,
    hard_factor,
    TRANSFORM: tl.constexpr,
    WANT_Y: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write the weighted logit gradient of one part of one row.

    Reads 8 bytes per column, and 4 more per bias. Writes one gradient element per column.
    """
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_parts = tl.num_programs(1)
    pointers = (
        student_ptr + row * student_stride,
        teacher_ptr + row * teacher_stride,
        student_bias_ptr,
        teacher_bias_ptr,
    )
    transform = (student_scale, teacher_scale, student_softcap, teacher_softcap)
    merged = merged_ptr + row * PART
    softmax = softmax_parts(merged)
    kl = 0.0
    if DIVERGENCE == REVERSE:
        kl = tl.load(merged + REVERSE_KL)
    if DIVERGENCE == MIXTURE:
        kl = tl.load(kl_ptr + row * kl_stride)
    weight = tl.load(weight_ptr + row)
    soft_factor, hard_factor = soft_factor * weight, hard_factor * weight
    label, y_factor = 0, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        hard_factor = tl.where(label >= 0, hard_factor, 0.0)
        y_factor = hard_factor / tl.load(merged + (SUM_Y if WANT_Y else SUM_S))
    # Each thread writes 16 bytes at once.
    width: tl.constexpr = 128 // grad_ptr.dtype.element_ty.primitive_bitwidth
    lanes = tile_columns(GROUPS, width)
    block: tl.constexpr = GROUPS * width

    for MASKED in tl.static_range(2):
        first, stop = index, n_columns // block
        if MASKED:
            first, stop = rest_of_part(index, n_parts, n_columns, block, block)
        for tile in range(first, stop, n_parts):
            columns = tile * block + lanes
            pair = load_pair(pointers, columns, n_columns, transform, TRANSFORM, MASKED)
            grad = soft_factor * logit_gradient(
                pair, softmax, factor, kl, beta, one_minus_beta, TRANSFORM, DIVERGENCE, HALF
            )
            if labels_ptr is not None:
                p_y = exp((pair[0] - softmax[0]) * label_factor)
                grad += tl.where(columns == label, p_y * y_factor - hard_factor, p_y * y_factor)
            grad = (grad * pair[3]).to(grad_ptr.dtype.element_ty)
            out = grad_ptr + row * grad_stride + columns
            if MASKED:
                tl.store(out, grad, mask=columns < n_columns)
            else:
                tl.store(out, grad)
