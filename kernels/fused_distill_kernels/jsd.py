"""Row kernels of the divergences over a chunk of float32 logits.

    statistics_kernel, merge_kernel   softmaxes, KL divergences and entropies; see row_statistics.py
    divergence_sums_kernel            sums over a row of other divergences, and of those with clipped terms
    gradient_kernel                   the logit gradient

All but merge_kernel run on a grid of (rows, parts): one program loops over every n_parts-th tile of one row.
Forward KL, reverse KL and their average take two passes over the logits, all others three.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import (
    FORWARD,
    MIXED,
    MIXTURE,
    REVERSE,
    TOTAL_VARIATION,
    clipped,
    divergence_terms,
    exp,
    is_mixture,
    mixture_kl_terms,
    mixture_terms,
    mul_zero_safe,
    slope,
    stable_prob_diff,
    variation_terms,
)
from .row_statistics import (
    LSE_DIFFERENCE,
    MAX_S,
    PART,
    REVERSE_KL,
    SUM_S,
    SUM_Y,
)
from .softmaxes import distributions, softmax_parts
from .tile import WIDTH, load_pair, rest_of_part, tile_columns


@triton.jit
def row_numbers(numbers, reverse_weight_ptr, row):
    """Return the numbers of `divergence_terms` in one row, which depend on the row if it has a weight."""
    a, b, c, rest, k = numbers
    if reverse_weight_ptr is not None:
        b = tl.load(reverse_weight_ptr + row)
        a = 1.0 - b
        k = a - b
    return a, b, c, rest, k


@triton.jit
def divergence_sums(
    pair,
    softmax,
    factor,
    numbers,
    clip,
    TRANSFORM: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return the groups' sums of what `divergence_sums_kernel` adds up; the third of two is 0."""
    p_s, p_t, d = distributions(pair, softmax, factor, TRANSFORM)
    three = p_s * 0.0
    if DIVERGENCE == TOTAL_VARIATION:
        three, leads, is_flat = variation_terms(p_s, p_t, d, clip, CLIP)
        two = tl.where(is_flat, 0.5 * p_s, tl.where(leads, p_s, 0.0))
        one = p_s - two
    elif CLIP:
        terms = divergence_terms(p_s, p_t, d, numbers, DIVERGENCE, HALF)
        two, one, _ = clipped(p_s, numbers, clip, terms, DIVERGENCE)
    elif DIVERGENCE == MIXTURE:
        one, two, _, _ = mixture_kl_terms(p_s, p_t, d, numbers[2], numbers[3], HALF)
    else:
        two, one, _ = divergence_terms(p_s, p_t, d, numbers, DIVERGENCE, HALF)
    return tl.sum(one, 1), tl.sum(two, 1), tl.sum(three, 1)


@triton.jit(do_not_specialize_on_alignment=["reverse_weight_ptr"])
def divergence_sums_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32 or None
    teacher_bias_ptr,  # (V,) float32 or None
    merged_ptr,  # (n, PART) float32
    reverse_weight_ptr,  # (n,) float32 or None
    sums_ptr,  # (n, 2 or 3, n_parts) float32, written
    n_columns,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    factor,
    teacher_weight,
    student_weight,
    teacher_share,
    student_share,
    imbalance,
    clip,
    TRANSFORM: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum the terms of a divergence over one part of one row.

    The sums are KL(student || mixture) and KL(teacher || mixture) for the Jensen-Shannon divergence; the
    student's probability of the tokens where it leads, and of those where the teacher leads, and the loss for
    the total variation; the sum of `slope` and the loss for all others.
    Reads 8 bytes per column, and 4 more per bias. Writes 8 or 12 bytes per part.
    """
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_parts = tl.num_programs(1)
    transform = (student_scale, teacher_scale, student_softcap, teacher_softcap)
    numbers = row_numbers(
        (teacher_weight, student_weight, teacher_share, student_share, imbalance), reverse_weight_ptr, row
    )
    offset, power_s, power_t, inverse_s, inverse_t, shift = softmax_parts(merged_ptr + row * PART, factor)
    # The sums are those of the probabilities over inverse_s, by which they are multiplied at the end.
    softmax = (offset, power_s, power_t, 1.0, inverse_t / inverse_s, shift)
    clip /= inverse_s
    lanes = tile_columns(GROUPS, WIDTH)
    half: tl.constexpr = GROUPS * WIDTH
    block: tl.constexpr = 2 * half
    # Moved to a tile's columns here, and by its number in the loop, pointers take the fewest operations.
    pointers = (
        student_ptr + row * student_stride + lanes,
        teacher_ptr + row * teacher_stride + lanes,
        None if student_bias_ptr is None else student_bias_ptr + lanes,
        None if teacher_bias_ptr is None else teacher_bias_ptr + lanes,
    )
    one = tl.zeros([GROUPS], tl.float32)
    two = tl.zeros([GROUPS], tl.float32)
    three = tl.zeros([GROUPS], tl.float32)

    for tile in range(index, n_columns // block, n_parts):
        start = tile * block
        left = load_pair(pointers, start, lanes, n_columns, transform, TRANSFORM, MASKED=False)
        right = load_pair(pointers, start, lanes, n_columns, transform, TRANSFORM, MASKED=False, AHEAD=half)
        l1, l2, l3 = divergence_sums(left, softmax, factor, numbers, clip, TRANSFORM, DIVERGENCE, CLIP, HALF)
        r1, r2, r3 = divergence_sums(right, softmax, factor, numbers, clip, TRANSFORM, DIVERGENCE, CLIP, HALF)
        one += l1 + r1
        two += l2 + r2
        three += l3 + r3
    first, stop = rest_of_part(index, n_parts, n_columns, block, half)
    for tile in range(first, stop):
        start = tile * half
        pair = load_pair(pointers, start, lanes, n_columns - start, transform, TRANSFORM, MASKED=True)
        l1, l2, l3 = divergence_sums(pair, softmax, factor, numbers, clip, TRANSFORM, DIVERGENCE, CLIP, HALF)
        one += l1
        two += l2
        three += l3

    out = sums_ptr + row * ((3 if DIVERGENCE == TOTAL_VARIATION else 2) * n_parts) + index
    invalid = tl.load(merged_ptr + row * PART + LSE_DIFFERENCE) * 0.0  # NaN logits are lost by tl.maximum
    tl.store(out, tl.sum(one, 0) * inverse_s + invalid)
    tl.store(out + n_parts, tl.sum(two, 0) * inverse_s + invalid)
    if DIVERGENCE == TOTAL_VARIATION:
        tl.store(out + 2 * n_parts, tl.sum(three, 0) * inverse_s + invalid)


@triton.jit
def logit_gradient(
    pair,
    softmax,
    factor,
    sums,
    numbers,
    clip,
    TRANSFORM: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return the divergence's gradient with respect to the student's z.

    That of the Jensen-Shannon divergence is over 1 - beta. sums are the first two of the row's sums, or its
    reverse KL. Unclipped gradients are multiplied as the probabilities of `distributions` are.
    """
    p_s, p_t, d = distributions(pair, softmax, factor, TRANSFORM)
    centre, teacher_leads = sums
    if DIVERGENCE == TOTAL_VARIATION:
        _, leads, is_flat = variation_terms(p_s, p_t, d, clip, CLIP)
        return p_s * tl.where(
            is_flat, 0.5 * (teacher_leads - centre), tl.where(leads, -centre, teacher_leads)
        )
    if CLIP:
        terms = divergence_terms(p_s, p_t, d, numbers, DIVERGENCE, HALF)
        _, _, is_clipped = clipped(p_s, numbers, clip, terms, DIVERGENCE)
        unclipped = slope(p_s, p_t, d, numbers, DIVERGENCE, HALF)
        return tl.where(is_clipped, numbers[4] * p_s, unclipped) - p_s * centre
    if DIVERGENCE == FORWARD:
        return stable_prob_diff(p_t, p_s, -d)
    if DIVERGENCE == REVERSE:
        return mul_zero_safe(p_s, -centre - d)
    if DIVERGENCE == MIXED:
        return numbers[0] * stable_prob_diff(p_t, p_s, -d) + mul_zero_safe(numbers[1] * p_s, -centre - d)
    if DIVERGENCE == MIXTURE:
        teacher_leads, distance, w, remainder, _, _, _ = mixture_terms(d, numbers[2], numbers[3], HALF)
        return p_s * ((remainder - w) - tl.where(teacher_leads, distance + centre, centre))
    return slope(p_s, p_t, d, numbers, DIVERGENCE, HALF) - p_s * centre


@triton.jit(do_not_specialize_on_alignment=["weight_ptr", "labels_ptr", "reverse_weight_ptr"])
def gradient_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32 or None
    teacher_bias_ptr,  # (V,) float32 or None
    merged_ptr,  # (n, PART) float32
    sums_ptr,  # (n, ...) float32, of `divergence_sums_kernel` if it was run
    sums_stride,
    reverse_weight_ptr,  # (n,) float32 or None
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
    teacher_weight,
    student_weight,
    teacher_share,
    student_share,
    imbalance,
    clip,
    soft_factor,
    hard_factor,
    TRANSFORM: tl.constexpr,
    WANT_Y: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
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
    numbers = row_numbers(
        (teacher_weight, student_weight, teacher_share, student_share, imbalance), reverse_weight_ptr, row
    )
    sums = (0.0, 0.0)
    if CLIP or is_mixture(DIVERGENCE) or DIVERGENCE == TOTAL_VARIATION:
        sums = (tl.load(sums_ptr + row * sums_stride), tl.load(sums_ptr + row * sums_stride + 1))
    elif DIVERGENCE != FORWARD:
        sums = (tl.load(merged + REVERSE_KL), 0.0)
    weight = tl.load(weight_ptr + row)
    soft_factor, hard_factor = soft_factor * weight, hard_factor * weight
    label, y_factor = 0, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        hard_factor = tl.where(label >= 0, hard_factor, 0.0)
        y_factor = hard_factor / tl.load(merged + (SUM_Y if WANT_Y else SUM_S))
    offset, power_s, power_t, inverse_s, inverse_t, shift = softmax_parts(merged, factor)
    if not CLIP:
        inverse_s, inverse_t = inverse_s * soft_factor, inverse_t * soft_factor
    softmax = (offset, power_s, power_t, inverse_s, inverse_t, shift)
    if DIVERGENCE == TOTAL_VARIATION and not CLIP:
        softmax = (offset, power_s, power_t, 1.0, inverse_t, shift)
        sums = (sums[0] * inverse_s, sums[1] * inverse_s)
    max_s = tl.load(merged + MAX_S)
    # Each thread writes 16 bytes at once, with clipped terms 4 columns, for which its registers suffice.
    width: tl.constexpr = WIDTH if CLIP else 128 // grad_ptr.dtype.element_ty.primitive_bitwidth
    lanes = tile_columns(GROUPS, width)
    block: tl.constexpr = GROUPS * width

    for MASKED in tl.static_range(2):
        first, stop = index, n_columns // block
        if MASKED:
            first, stop = rest_of_part(index, n_parts, n_columns, block, block)
        for tile in range(first, stop, n_parts):
            start = tile * block
            left = n_columns - start
            pair = load_pair(pointers, start + lanes, lanes, left, transform, TRANSFORM, MASKED=MASKED)
            grad = logit_gradient(
                pair, softmax, factor, sums, numbers, clip, TRANSFORM, DIVERGENCE, CLIP, HALF
            )
            if CLIP:
                grad *= soft_factor
            if labels_ptr is not None:
                p_y = exp((pair[0] - max_s) * label_factor)
                grad += tl.where(lanes == label - start, p_y * y_factor - hard_factor, p_y * y_factor)
            grad = (grad * pair[3]).to(grad_ptr.dtype.element_ty)
            out = grad_ptr + row * grad_stride + (start + lanes)
            if MASKED:
                tl.store(out, grad, mask=lanes < left)
            else:
                tl.store(out, grad)
