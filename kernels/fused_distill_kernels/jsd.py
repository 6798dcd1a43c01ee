"""Row kernels of the generalized Jensen-Shannon divergence over a chunk of float32 logits.

Both kernels run on a grid of (rows, tiles): one program has one tile of BLOCK columns of one row of both
models in registers, and reads what it needs of the row's other tiles as partial sums of the launch before:

    statistics_kernel               maximum and sum of exponentials of each model, sum of their differences
    divergence_kernel, WANT_SUMS    the divergence's terms, entropies; for beta = 0 also the gradient
    divergence_kernel, WRITE_GRAD   the gradient; for beta > 0 it needs the row's KL(student || mixture) first

Hence two passes over the logits for beta = 0 and three for the rest.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import (
    exp_below,
    kl_terms,
    load_logits,
    log1p,
    log_gap,
    mixture_log_ratios,
    signed_gap,
    times,
)

BLOCK = 2048


def num_warps(want_stats: bool) -> int:
    """Eight columns a thread; four where statistics are wanted, whose longer live ranges would spill."""
    return 16 if want_stats else 8


FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
MIXTURE = tl.constexpr(2)

# Partial sums of one tile, one row of the tables that the kernels hand on.
STATISTICS = tl.constexpr(7)  # max_s, sum_s, max_t, sum_t, sum of signed gaps, max_y, sum_y
SUMS = tl.constexpr(
    8
)  # KL(s || m), KL(t || m), label surprise, entropy_s, entropy_t, forward KL, reverse KL, shared top token


@triton.jit
def statistics_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32
    teacher_bias_ptr,  # (V,) float32
    statistics_ptr,  # (n, STATISTICS, n_tiles) float32, written
    n_columns,
    n_tiles,
    inv_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile's log-sum-exp parts. Reads 8 bytes a column, writes 28 bytes a tile.

    The sum of e^z_t - e^z_s over the row gives the difference of the log-sum-exps without cancellation.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y_s, _ = load_logits(
        student_ptr + row * student_stride,
        student_bias_ptr,
        columns,
        inside,
        student_scale,
        student_softcap,
        HAS_STUDENT_BIAS,
        HAS_STUDENT_SOFTCAP,
    )
    y_t, _ = load_logits(
        teacher_ptr + row * teacher_stride,
        teacher_bias_ptr,
        columns,
        inside,
        teacher_scale,
        teacher_softcap,
        HAS_TEACHER_BIAS,
        HAS_TEACHER_SOFTCAP,
    )
    z_s, z_t = y_s * inv_temperature, y_t * inv_temperature
    max_s, max_t = tl.max(z_s, 0), tl.max(z_t, 0)
    top = tl.maximum(max_s, max_t)
    exp_s, exp_t = exp_below(z_s, max_s), exp_below(z_t, max_t)
    gap = signed_gap(exp_s * exp_below(max_s, top), exp_t * exp_below(max_t, top), log_gap(z_s, z_t))

    out = statistics_ptr + row * (STATISTICS * n_tiles) + tile
    tl.store(out, max_s)
    tl.store(out + n_tiles, tl.sum(exp_s, 0))
    tl.store(out + 2 * n_tiles, max_t)
    tl.store(out + 3 * n_tiles, tl.sum(exp_t, 0))
    tl.store(out + 4 * n_tiles, tl.sum(gap, 0))
    if HAS_LABELS:
        max_y = tl.max(y_s, 0)
        tl.store(out + 5 * n_tiles, max_y)
        tl.store(out + 6 * n_tiles, tl.sum(exp_below(y_s, max_y), 0))


@triton.jit
def divergence_kernel(
    student_ptr,  # (n, V) float32
    student_stride,
    teacher_ptr,  # (n, V) float32
    teacher_stride,
    student_bias_ptr,  # (V,) float32
    teacher_bias_ptr,  # (V,) float32
    statistics_ptr,  # (n, STATISTICS, n_tiles) float32
    sums_ptr,  # (n, SUMS, n_tiles) float32, written
    grad_ptr,  # (n, V), written if WRITE_GRAD
    grad_stride,
    weight_ptr,  # (n,) float32
    labels_ptr,  # (n,) int64
    n_columns,
    n_tiles,
    beta,
    one_minus_beta,
    inv_temperature,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    hard_weight,
    soft_weight,
    DIVERGENCE: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    WANT_SUMS: tl.constexpr,
    WANT_STATS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """One tile's terms of the divergence (WANT_SUMS) or its logit gradient (WRITE_GRAD), both for beta = 0.

    Reads 8 bytes a column and 20 bytes for each of the row's tiles; writes 4 to 32 bytes of sums a tile, and
    with WRITE_GRAD one gradient element a column. For beta > 0 the gradient reads a first launch's sums.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = statistics_ptr + row * (STATISTICS * n_tiles)
    tiles = tl.arange(0, TILES)
    max_s, sum_s = _combine(parts, n_tiles, tiles)
    max_t, sum_t = _combine(parts + 2 * n_tiles, n_tiles, tiles)
    log_ratio = _log_ratio(parts, n_tiles, tiles, max_s, sum_s, max_t, sum_t)

    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y_s, slope = load_logits(
        student_ptr + row * student_stride,
        student_bias_ptr,
        columns,
        inside,
        student_scale,
        student_softcap,
        HAS_STUDENT_BIAS,
        HAS_STUDENT_SOFTCAP,
    )
    y_t, _ = load_logits(
        teacher_ptr + row * teacher_stride,
        teacher_bias_ptr,
        columns,
        inside,
        teacher_scale,
        teacher_softcap,
        HAS_TEACHER_BIAS,
        HAS_TEACHER_SOFTCAP,
    )
    z_s, z_t = y_s * inv_temperature, y_t * inv_temperature
    p_s, p_t = tl.exp(z_s - max_s) / sum_s, tl.exp(z_t - max_t) / sum_t
    d = log_gap(z_s, z_t) - log_ratio
    gap = signed_gap(p_s, p_t, d)

    sums = sums_ptr + row * (SUMS * n_tiles)
    if WANT_STATS:
        shared_top = tl.where(inside & (z_s == max_s) & (z_t == max_t), 1.0, 0.0)
        tl.store(sums + 3 * n_tiles + tile, tl.sum(times(p_s, tl.log(sum_s) - (z_s - max_s)), 0))
        tl.store(sums + 4 * n_tiles + tile, tl.sum(times(p_t, tl.log(sum_t) - (z_t - max_t)), 0))
        tl.store(sums + 5 * n_tiles + tile, tl.sum(kl_terms(p_t, -d, -gap), 0))
        tl.store(sums + 6 * n_tiles + tile, tl.sum(kl_terms(p_s, d, gap), 0))
        tl.store(sums + 7 * n_tiles + tile, tl.max(shared_top, 0))

    u, v = d, -d  # log m - log p_s, log m - log p_t
    if DIVERGENCE == MIXTURE:
        u, v = mixture_log_ratios(d, beta, one_minus_beta)
    if WANT_SUMS:
        if DIVERGENCE != FORWARD:
            tl.store(sums + tile, tl.sum(kl_terms(p_s, u, beta * gap), 0))
        if DIVERGENCE != REVERSE:
            tl.store(sums + n_tiles + tile, tl.sum(kl_terms(p_t, v, -one_minus_beta * gap), 0))

    residual = p_s * 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        max_y, sum_y = _combine(parts + 5 * n_tiles, n_tiles, tiles)
        at_label = columns == label
        if WANT_SUMS:
            surprise = tl.where(at_label, tl.log(sum_y) + (max_y - y_s), 0.0)
            tl.store(sums + 2 * n_tiles + tile, tl.sum(surprise, 0))
        residual = tl.exp(y_s - max_y) / sum_y - tl.where(at_label, 1.0, 0.0)
        residual = tl.where(label >= 0, hard_weight * residual, 0.0)

    if WRITE_GRAD:
        if DIVERGENCE == FORWARD:
            grad = -gap
        else:
            kl = tl.sum(tl.load(sums + tiles, mask=tiles < n_tiles, other=0.0), 0)
            grad = times(p_s, -u - kl)
            if DIVERGENCE == MIXTURE:
                grad *= one_minus_beta
        grad = (grad * (inv_temperature * soft_weight) + residual) * slope * tl.load(weight_ptr + row)
        out = grad_ptr + row * grad_stride + columns
        tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine(parts, n_tiles, tiles):
    """A row's maximum and sum of exponentials from its tiles'."""
    maxima = tl.load(parts + tiles, mask=tiles < n_tiles, other=float("-inf"))
    sums = tl.load(parts + n_tiles + tiles, mask=tiles < n_tiles, other=0.0)
    top = tl.max(maxima, 0)
    return top, tl.sum(sums * exp_below(maxima, top), 0)


@triton.jit
def _log_ratio(parts, n_tiles, tiles, max_s, sum_s, max_t, sum_t):
    """lse_t - lse_s of a row, with an error that shrinks with the distance between the models."""
    held = tiles < n_tiles
    tile_tops = tl.maximum(
        tl.load(parts + tiles, mask=held, other=float("-inf")),
        tl.load(parts + 2 * n_tiles + tiles, mask=held, other=float("-inf")),
    )
    top = tl.maximum(max_s, max_t)
    gaps = tl.load(parts + 4 * n_tiles + tiles, mask=held, other=0.0)
    excess = tl.sum(gaps * exp_below(tile_tops, top), 0) / (sum_s * tl.exp(max_s - top))
    plain = (max_t - max_s) + (tl.log(sum_t) - tl.log(sum_s))
    return tl.where(tl.abs(excess) < 0.5, log1p(excess), plain)


def jsd_rows(
    student_logits: Tensor,  # (n, V) float32, columns contiguous
    teacher_logits: Tensor,  # (n, V) float32, columns contiguous
    weight: Tensor,  # (n,) float32
    *,
    beta: float,
    temperature: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    hard_weight: float,
    soft_weight: float,
    student_bias: Tensor | None,  # (V,) float32
    teacher_bias: Tensor | None,  # (V,) float32
    labels: Tensor | None,  # (n,) int64, -100 where there is none, any above V where it is no column
    grad: Tensor
    | None,  # (n, V) any float dtype, may be student_logits: receives the weighted logit gradient
    return_stats: bool,
    on_statistics: Callable[[Tensor], None] | None = None,
    on_sums: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Row sums (n, 8) in float32 in the order of SUMS; entries that were not asked for are 0.

    Where the columns are a part of the vocabulary, on_statistics makes the table (n, STATISTICS, tiles) that
    of all of it, and on_sums the table (n, SUMS, tiles), before a later launch reads them.
    """
    n, n_columns = student_logits.shape
    n_tiles = triton.cdiv(n_columns, BLOCK)
    statistics = student_logits.new_empty(n, STATISTICS.value, n_tiles)
    sums = student_logits.new_zeros(n, SUMS.value, n_tiles)
    if n == 0:
        return sums.sum(-1)
    divergence = 0 if beta == 0 else 1 if beta == 1 else 2
    unused = student_logits
    logits = (student_logits, student_logits.stride(0), teacher_logits, teacher_logits.stride(0))
    biases = (
        unused if student_bias is None else student_bias,
        unused if teacher_bias is None else teacher_bias,
    )
    transforms = (
        1.0 / temperature,
        student_logit_scale,
        teacher_logit_scale,
        student_softcap or 1.0,
        teacher_softcap or 1.0,
    )
    flags = {
        "HAS_STUDENT_BIAS": student_bias is not None,
        "HAS_TEACHER_BIAS": teacher_bias is not None,
        "HAS_STUDENT_SOFTCAP": student_softcap is not None,
        "HAS_TEACHER_SOFTCAP": teacher_softcap is not None,
        "HAS_LABELS": labels is not None,
        "BLOCK": BLOCK,
    }
    grid = (n, n_tiles)

    def divergence_pass(want_sums: bool, write_grad: bool) -> None:
        launch: Any = divergence_kernel[grid]
        launch(
            *logits,
            *biases,
            statistics,
            sums,
            unused if grad is None else grad,
            0 if grad is None else grad.stride(0),
            weight,
            unused if labels is None else labels,
            n_columns,
            n_tiles,
            float(beta),
            1.0 - beta,
            *transforms,
            hard_weight,
            soft_weight,
            DIVERGENCE=divergence,
            WANT_SUMS=want_sums,
            WANT_STATS=want_sums and return_stats,
            WRITE_GRAD=write_grad,
            TILES=triton.next_power_of_2(n_tiles),
            num_warps=num_warps(want_sums and return_stats),
            **flags,
        )

    with torch.cuda.device_of(student_logits):
        statistics_launch: Any = statistics_kernel[grid]
        statistics_launch(
            *logits, *biases, statistics, n_columns, n_tiles, *transforms, **flags, num_warps=num_warps(False)
        )
        if on_statistics is not None:
            on_statistics(statistics)
        one_pass = grad is not None and divergence == 0
        divergence_pass(want_sums=True, write_grad=one_pass)
        if on_sums is not None:
            on_sums(sums)
        if grad is not None and not one_pass:
            divergence_pass(want_sums=False, write_grad=True)
    return sums.sum(-1)
