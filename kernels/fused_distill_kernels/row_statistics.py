"""Row statistics of two models' logits: softmax parts, both KL divergences and entropies, in one pass.

    statistics_kernel   a share of one row's tiles to one part, a few numbers
    merge_kernel        the parts of a row to the part of the whole row

A part holds the numbers of PART for a set of columns. Two maxima and sums of exponentials describe the
softmaxes of the set. The KL divergences are those between the softmaxes normalised within the set. Parts of
disjoint sets merge without cancellation by the chain rule: with P_i and Q_i the two models' probabilities of
set i, KL(p || q) = sum_i P_i (KL inside set i) + KL(P || Q).
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LN_2, LOG2_E, exp, log_ratio, mul_zero_safe, pair_terms
from .running_part import accumulate, empty_part, raised, relative_to_maxima
from .tile import (
    LINEAR,
    LOWEST,
    NO_ERROR,
    WIDTH,
    gap_beyond,
    load_pair,
    offset_between,
    rest_of_part,
    tile_columns,
)

# Fields of a part. s is the student, t the teacher, v as above, y = label_factor * v the student's logits at
# temperature 1.
MAX_S, MAX_T = tl.constexpr(0), tl.constexpr(1)  # maxima of v
SUM_S, SUM_T = tl.constexpr(2), tl.constexpr(3)  # sums of e^(z - max z)
DIFFERENCE = tl.constexpr(4)  # sum_t - sum_s, without cancellation
REVERSE_KL, FORWARD_KL = tl.constexpr(5), tl.constexpr(6)  # KL(s || t), KL(t || s) within the part
MOMENT_S, MOMENT_T = tl.constexpr(7), tl.constexpr(8)  # sums of e^u u / log(2), u = z - max z
TOP = tl.constexpr(9)  # 0 if both models have the same most likely token, otherwise negative
SUM_Y = tl.constexpr(10)  # sum of e^(y - max y)
LABEL = tl.constexpr(11)  # v of the student's label, 0 if another part has it
# Results for the whole row, written by merge_kernel.
LSE_DIFFERENCE = tl.constexpr(12)  # log(sum_t / sum_s)
ENTROPY_S, ENTROPY_T = tl.constexpr(13), tl.constexpr(14)
NLL = tl.constexpr(15)  # negative log-probability of the label at temperature 1
PART = tl.constexpr(16)


@triton.jit
def normalised(part):
    """Return parts whose KL divergences are those between the parts' own softmaxes."""
    max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    _, excess_s = log_ratio(sum_s, sum_t, difference)
    _, excess_t = log_ratio(sum_t, sum_s, -difference)
    # A set in which one model has no probability: its KL is infinite, and so is the excess.
    reverse = tl.maximum(reverse / sum_s - tl.where(sum_t == 0, 0.0, excess_s), 0.0)
    forward = tl.maximum(forward / sum_t - tl.where(sum_s == 0, 0.0, excess_t), 0.0)
    return max_s, max_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y


@triton.jit
def merge(part, factor, label_factor):
    """Merge the parts along the only dimension; return the merged part and its log(sum_t / sum_s)."""
    old_s, old_t, sum_s, sum_t, difference, reverse, forward, moment_s, moment_t, top, sum_y = part
    max_s, max_t = tl.max(old_s, 0), tl.max(old_t, 0)
    offset, exp_factor = offset_between(max_s, max_t, factor), factor * LOG2_E
    shift = gap_beyond(old_s, old_t - offset, NO_ERROR, offset, LINEAR) - ((max_t - offset) - max_s)
    shift *= factor
    power_s, power_t = (old_s - max_s) * exp_factor, (old_t - max_t) * exp_factor
    scale_s, scale_t = tl.math.exp2(power_s), tl.math.exp2(power_t)
    d, _, _ = pair_terms(scale_s, scale_t, shift)
    total_s, total_t = tl.sum(scale_s * sum_s, 0), tl.sum(scale_t * sum_t, 0)
    total_difference = tl.sum(scale_s * difference + d * sum_t, 0)
    lse_difference, _ = log_ratio(total_s, total_t, total_difference)
    lse_difference_of_part, _ = log_ratio(sum_s, sum_t, difference)
    p, q = scale_s * sum_s / total_s, scale_t * sum_t / total_t
    _, kl_s, kl_t = pair_terms(p, q, shift + (lse_difference_of_part - lse_difference))
    invalid = 0.0 * total_difference  # NaN logits are lost by tl.maximum
    merged = (
        max_s,
        max_t,
        total_s,
        total_t,
        total_difference,
        tl.sum(mul_zero_safe(p, reverse) + kl_s, 0) + invalid,
        tl.sum(mul_zero_safe(q, forward) + kl_t, 0) + invalid,
        tl.sum(scale_s * (moment_s + power_s * sum_s), 0),
        tl.sum(scale_t * (moment_t + power_t * sum_t), 0),
        tl.max(top + ((old_s - max_s) + (old_t - max_t)), 0),
        tl.sum(sum_y * exp((old_s - max_s) * label_factor), 0),
    )
    return merged, lse_difference


@triton.jit(do_not_specialize_on_alignment=["labels_ptr"])
def statistics_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32 or None
    teacher_bias_ptr,  # (V,) float32 or None
    labels_ptr,  # (n,) int64 or None
    parts_ptr,  # (n, PART, n_parts) float32, written
    n_columns,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    factor,
    label_factor,
    TRANSFORM: tl.constexpr,
    WANT_REVERSE: tl.constexpr,
    WANT_FORWARD: tl.constexpr,
    WANT_STATS: tl.constexpr,
    WANT_Y: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Compute one part of one row's statistics, from every n_parts-th tile of the row.

    A tile has 2 * GROUPS * WIDTH columns, which are loaded together and added half by half: this takes fewer
    registers. Each thread keeps the statistics of its own columns in registers.
    Reads 8 bytes per column, and 4 more per bias. Writes at most 48 bytes per part.
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
    want = (WANT_REVERSE, WANT_FORWARD, WANT_STATS, WANT_Y)
    lanes = tile_columns(GROUPS, WIDTH)
    half: tl.constexpr = GROUPS * WIDTH
    block: tl.constexpr = 2 * half
    running = empty_part(factor, GROUPS)

    for tile in range(index, n_columns // block, n_parts):
        offset = tile * block + lanes
        one = load_pair(pointers, offset, lanes, n_columns, transform, TRANSFORM, MASKED=False)
        two = load_pair(pointers, offset, lanes, n_columns, transform, TRANSFORM, MASKED=False, AHEAD=half)
        top_s, top_t = tl.maximum(one[0], two[0]), tl.maximum(one[1], two[1])
        running = raised(running, tl.max(top_s, 1), tl.max(top_t, 1), factor, label_factor, want)
        running = accumulate(running, one, factor, label_factor, want, TRANSFORM)
        running = accumulate(running, two, factor, label_factor, want, TRANSFORM)
    first, stop = rest_of_part(index, n_parts, n_columns, block, half)
    for tile in range(first, stop):
        start = tile * half
        pair = load_pair(pointers, start + lanes, lanes, n_columns - start, transform, TRANSFORM, MASKED=True)
        running = raised(running, tl.max(pair[0], 1), tl.max(pair[1], 1), factor, label_factor, want)
        running = accumulate(running, pair, factor, label_factor, want, TRANSFORM)
    part = relative_to_maxima(running, factor, want)
    merged, _ = merge(normalised(part), factor, label_factor)
    out = parts_ptr + row * (PART * n_parts) + index
    for field in tl.static_range(11):
        tl.store(out + field * n_parts, merged[field])
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        held = (label >= 0) & (label < n_columns) & (index == 0)
        column = tl.where(held, label, n_columns)
        v_s, _, _, _ = load_pair(pointers, column, column, n_columns, transform, TRANSFORM, MASKED=True)
        tl.store(out + LABEL * n_parts, tl.where(held, v_s, 0.0))


@triton.jit(do_not_specialize_on_alignment=["labels_ptr"])
def merge_kernel(
    parts_ptr,  # (n, PART, n_parts) float32
    labels_ptr,  # (n,) int64 or None
    merged_ptr,  # (n, PART) float32, written
    n_parts,
    factor,
    label_factor,
    WANT_Y: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Merge one row's parts and compute the results for the whole row. Moves 64 bytes per part."""
    row = tl.program_id(0).to(tl.int64)
    parts, out = parts_ptr + row * (PART * n_parts), merged_ptr + row * PART
    index = tl.arange(0, MAX_PARTS)
    held = index < n_parts
    part = (
        tl.load(parts + MAX_S * n_parts + index, mask=held, other=LOWEST),
        tl.load(parts + MAX_T * n_parts + index, mask=held, other=LOWEST),
        tl.load(parts + SUM_S * n_parts + index, mask=held, other=0.0),
        tl.load(parts + SUM_T * n_parts + index, mask=held, other=0.0),
        tl.load(parts + DIFFERENCE * n_parts + index, mask=held, other=0.0),
        tl.load(parts + REVERSE_KL * n_parts + index, mask=held, other=0.0),
        tl.load(parts + FORWARD_KL * n_parts + index, mask=held, other=0.0),
        tl.load(parts + MOMENT_S * n_parts + index, mask=held, other=0.0),
        tl.load(parts + MOMENT_T * n_parts + index, mask=held, other=0.0),
        tl.load(parts + TOP * n_parts + index, mask=held, other=LOWEST),
        tl.load(parts + SUM_Y * n_parts + index, mask=held, other=0.0),
    )
    merged, lse_difference = merge(part, factor, label_factor)
    for field in tl.static_range(11):
        tl.store(out + field, merged[field])
    tl.store(out + LSE_DIFFERENCE, lse_difference)
    tl.store(out + ENTROPY_S, tl.log(merged[SUM_S]) - merged[MOMENT_S] / merged[SUM_S] * LN_2)
    tl.store(out + ENTROPY_T, tl.log(merged[SUM_T]) - merged[MOMENT_T] / merged[SUM_T] * LN_2)
    if labels_ptr is not None:
        label = tl.sum(tl.load(parts + LABEL * n_parts + index, mask=held, other=0.0), 0)
        sum_y = merged[SUM_Y] if WANT_Y else merged[SUM_S]
        nll = tl.log(sum_y) + (merged[MAX_S] - label) * label_factor
        tl.store(out + LABEL, label)
        tl.store(out + NLL, tl.where(tl.load(labels_ptr + row) >= 0, nll, 0.0))
