"""Tiles of logits: the columns of a tile, and how projections are loaded and transformed."""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import tanh, tanh_difference, transform_logits

# How projections become logits over temperature: z = factor * v.
LINEAR = tl.constexpr(0)  # v is the projection plus bias: both models have the same scale and no softcap
SOFTCAP = tl.constexpr(1)  # v is tanh(scale / softcap * (projection + bias)), with the same numbers for both
SEPARATE = tl.constexpr(2)  # v is the logit: the models have different scales or softcaps

NO_ERROR = tl.constexpr(-0.0)  # unlike that of 0.0, its addition never changes a number, and is left out
LOWEST = tl.constexpr(-1.0e30)  # the maximum of no logits; finite, because infinities do not subtract
WIDTH = tl.constexpr(4)  # columns of a thread that it loads at once, 16 bytes


@triton.jit
def load_columns(pointer, columns, n_columns, other, MASKED: tl.constexpr):
    """Load the columns of a row that a pointer points to, `other` beyond n_columns if MASKED."""
    if MASKED:
        return tl.load(pointer, mask=columns < n_columns, other=other)
    return tl.load(pointer)


@triton.jit
def masked(v, columns, n_columns, MASKED: tl.constexpr):
    """Return v, -inf beyond n_columns if MASKED, where a softcap has made it finite."""
    return tl.where(columns < n_columns, v, float("-inf")) if MASKED else v


@triton.jit
def add_bias(x, bias):
    """Return x + bias as a rounded sum and its rounding error."""
    total = x + bias
    other = total - x
    return total, (x - (total - other)) + (bias - other)


@triton.jit
def scaled(x, error, scale, softcap):
    """Return the logit of x + error, its rounding error without a softcap, and its derivative over scale."""
    if softcap is not None:
        t = tanh(x, scale / softcap)
        y, rounding, derivative = softcap * t, 0.0, tl.maximum(1.0 - t * t, 0.0)
    else:
        y = x * scale
        rounding, derivative = tl.fma(x, scale, -y) + error * scale, 1.0
    return y, rounding, derivative


@triton.jit
def load_pair(
    pointers,  # to the student's row, the teacher's row, the student's bias and the teacher's
    offset,  # of the columns from the pointers, less AHEAD
    columns,
    n_columns,
    transform,  # student_scale, teacher_scale, student_softcap, teacher_softcap
    TRANSFORM: tl.constexpr,
    MASKED: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):
    """Load one tile of both models' projections; v_s and v_t are -inf beyond n_columns if MASKED.

    Tiles that are loaded together share their offset, so that AHEAD is part of the load instruction.

    Returns:
        v_s, v_t: see TRANSFORM.
        extra: the rounding error of v_t - v_s; with SOFTCAP the difference itself. See `gap_beyond`.
        derivative: of the student's logit with respect to its projection, over student_scale.
    """
    student, teacher, student_bias, teacher_bias = pointers
    student_scale, teacher_scale, student_softcap, teacher_softcap = transform
    x_s = load_columns(student + offset + AHEAD, columns, n_columns, float("-inf"), MASKED)
    x_t = load_columns(teacher + offset + AHEAD, columns, n_columns, float("-inf"), MASKED)
    error_s, error_t = 0.0, 0.0
    if student_bias is not None:
        bias = load_columns(student_bias + offset + AHEAD, columns, n_columns, 0.0, MASKED)
        x_s, error_s = add_bias(x_s, bias)
    if teacher_bias is not None:
        bias = load_columns(teacher_bias + offset + AHEAD, columns, n_columns, 0.0, MASKED)
        x_t, error_t = add_bias(x_t, bias)
    has_bias: tl.constexpr = student_bias is not None or teacher_bias is not None
    extra = error_t - error_s if has_bias else NO_ERROR
    if TRANSFORM == LINEAR:
        v_s, v_t, derivative = x_s, x_t, 1.0
    elif TRANSFORM == SOFTCAP:
        inner = student_scale / student_softcap
        difference = ((x_t - x_s) + extra) * inner
        v_s = masked(tanh(x_s, inner), columns, n_columns, MASKED)
        v_t = masked(tanh(x_t, inner), columns, n_columns, MASKED)
        derivative = tl.maximum(1.0 - v_s * v_s, 0.0)
        extra = tanh_difference(v_t, v_s, difference)
    else:
        v_s, error_s, derivative = scaled(x_s, error_s, student_scale, student_softcap)
        v_t, error_t, _ = scaled(x_t, error_t, teacher_scale, teacher_softcap)
        v_s, v_t = masked(v_s, columns, n_columns, MASKED), masked(v_t, columns, n_columns, MASKED)
        extra = error_t - error_s
    if TRANSFORM == SEPARATE or (TRANSFORM == LINEAR and has_bias):
        extra = tl.where(tl.abs(v_t - v_s) < 1.0e30, extra, 0.0)
    return v_s, v_t, extra, derivative


@triton.jit
def load_logits(
    row_ptr,
    bias_ptr,  # or None
    columns,
    n_columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return one tile of one model's logits, and their derivative with respect to the projection.

    Logits are -inf beyond n_columns if MASKED, and where the caller has set the projection to -inf.
    """
    x = load_columns(row_ptr + columns, columns, n_columns, float("-inf"), MASKED)
    inside = x != float("-inf")
    if bias_ptr is not None:
        x += load_columns(bias_ptr + columns, columns, n_columns, 0.0, MASKED)
    y, dlogit_dproj = transform_logits(x, scale, softcap, HAS_SOFTCAP)
    return tl.where(inside, y, float("-inf")), dlogit_dproj


@triton.jit
def offset_between(max_s, max_t, factor):
    """Return a number close to max_t - max_s with few binary digits, and 0 if a model has no logit.

    Its subtraction from a teacher's v is exact where the probability counts. So an offset of the teacher's
    logits does not cost digits of their difference. It is rounded by the addition of a large number.
    """
    gap, large = max_t - max_s, 96.0 / factor
    return tl.where(tl.abs(gap) < -0.1 * LOWEST, (gap + large) - large, 0.0)


@triton.jit
def gap_beyond(v_s, v_t_less_offset, extra, offset, TRANSFORM: tl.constexpr):
    """Return (v_t - v_s) - offset, given v_t - offset and `extra` of `load_pair`."""
    return extra - offset if TRANSFORM == SOFTCAP else (v_t_less_offset - v_s) + extra


@triton.jit
def rest_of_part(index, n_parts, n_columns, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """Return the bounds of the loop over pieces of the last, partial block, which one part has."""
    whole = n_columns // BLOCK
    n_pieces = tl.where(whole % n_parts == index, tl.cdiv(n_columns - whole * BLOCK, PIECE), 0)
    first = whole * (BLOCK // PIECE)
    return first, first + n_pieces


@triton.jit
def tile_columns(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns of a tile, (GROUPS, WIDTH).

    A group's columns belong to one thread if there are GROUPS threads.
    """
    return tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
