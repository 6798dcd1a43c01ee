"""Row kernels of the generalized Jensen-Shannon divergence over a chunk of float32 logits.

Both kernels run on a grid of (rows, tiles). One program holds one tile of BLOCK columns of one row of both
models in registers, and writes the tile's partial sums. A later launch adds up those of all tiles of its row.

    statistics_kernel               maximum and sum of exponentials of each model, sum of their differences
    divergence_kernel, WANT_SUMS    terms of the divergence, and with WANT_STATS the per-token statistics
    divergence_kernel, WRITE_GRAD   the gradient; for beta > 0 it needs the row's KL(student || mixture) first

With a gradient, beta = 0 takes two passes over the logits, because one launch computes sums and gradient.
Other values of beta take three.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import (
    exp_sub_max,
    kl_terms,
    load_logits,
    log_gap,
    lse_difference,
    mixture_log_ratios,
    mul_zero_safe,
    stable_prob_diff,
)

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import LossConfig

BLOCK = 2048


def num_warps(want_stats: bool) -> int:
    """Return warps for 8 columns per thread, or for 4 with statistics, which would spill registers."""
    return 16 if want_stats else 8


FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
MIXTURE = tl.constexpr(2)

# Numbers per tile, passed from one launch to the next. y are the student's logits at temperature 1.
STATISTICS = tl.constexpr(7)  # max_s, sum_s, max_t, sum_t, sum of probability differences, max_y, sum_y
# KL(s || m), KL(t || m), the label's negative log-probability, entropy_s, entropy_t, forward KL, reverse KL,
# top-1 match. m is the mixture; for beta = 0 or 1 it is the other model, and one of the two KLs stays 0.
SUMS = tl.constexpr(8)


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
    """Compute one tile's log-sum-exp parts.

    Reads 8 bytes per column, and 4 more per bias. Writes 20 bytes per tile, or 28 with labels. The sum of
    e^z_t - e^z_s over the row gives the difference of the log-sum-exps without cancellation.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    student_row, teacher_row = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    # fmt: off
    y_s, _ = load_logits(
        student_row, student_bias_ptr, columns, inside, student_scale, student_softcap,
        HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP,
    )
    y_t, _ = load_logits(
        teacher_row, teacher_bias_ptr, columns, inside, teacher_scale, teacher_softcap,
        HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP,
    )
    # fmt: on
    z_s, z_t = y_s * inv_temperature, y_t * inv_temperature
    max_s, max_t = tl.max(z_s, 0), tl.max(z_t, 0)
    larger = tl.maximum(max_s, max_t)
    exp_s, exp_t = exp_sub_max(z_s, max_s), exp_sub_max(z_t, max_t)
    diff = stable_prob_diff(
        exp_s * exp_sub_max(max_s, larger), exp_t * exp_sub_max(max_t, larger), log_gap(z_s, z_t)
    )

    out = statistics_ptr + row * (STATISTICS * n_tiles) + tile
    tl.store(out, max_s)
    tl.store(out + n_tiles, tl.sum(exp_s, 0))
    tl.store(out + 2 * n_tiles, max_t)
    tl.store(out + 3 * n_tiles, tl.sum(exp_t, 0))
    tl.store(out + 4 * n_tiles, tl.sum(diff, 0))
    if HAS_LABELS:
        max_y = tl.max(y_s, 0)
        tl.store(out + 5 * n_tiles, max_y)
        tl.store(out + 6 * n_tiles, tl.sum(exp_sub_max(y_s, max_y), 0))


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
    """Compute one tile's divergence terms (WANT_SUMS), logit gradient (WRITE_GRAD), or both for beta = 0.

    Reads 8 bytes per column, 4 more per bias, and the statistics of all tiles of the row: 20 bytes per tile,
    or 28 with labels. WANT_SUMS writes 4 to 32 bytes for its tile, WRITE_GRAD a gradient element per column.
    For beta > 0 the gradient also reads 4 bytes per tile of the row, the sums of an earlier launch.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = statistics_ptr + row * (STATISTICS * n_tiles)
    tiles = tl.arange(0, TILES)
    max_s, sum_s = _combine(parts, n_tiles, tiles)
    max_t, sum_t = _combine(parts + 2 * n_tiles, n_tiles, tiles)
    lse_diff = lse_difference(max_s, max_t, sum_s, sum_t, _diff_sum(parts, n_tiles, tiles, max_s, max_t))

    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    student_row, teacher_row = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    # fmt: off
    y_s, dlogit_dproj = load_logits(
        student_row, student_bias_ptr, columns, inside, student_scale, student_softcap,
        HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP,
    )
    y_t, _ = load_logits(
        teacher_row, teacher_bias_ptr, columns, inside, teacher_scale, teacher_softcap,
        HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP,
    )
    # fmt: on
    z_s, z_t = y_s * inv_temperature, y_t * inv_temperature
    p_s, p_t = tl.exp(z_s - max_s) / sum_s, tl.exp(z_t - max_t) / sum_t
    d = log_gap(z_s, z_t) - lse_diff
    prob_diff = stable_prob_diff(p_s, p_t, d)

    sums = sums_ptr + row * (SUMS * n_tiles)
    if WANT_STATS:
        top1_match = tl.where(inside & (z_s == max_s) & (z_t == max_t), 1.0, 0.0)
        tl.store(sums + 3 * n_tiles + tile, tl.sum(mul_zero_safe(p_s, tl.log(sum_s) - (z_s - max_s)), 0))
        tl.store(sums + 4 * n_tiles + tile, tl.sum(mul_zero_safe(p_t, tl.log(sum_t) - (z_t - max_t)), 0))
        tl.store(sums + 5 * n_tiles + tile, tl.sum(kl_terms(p_t, -d, -prob_diff), 0))
        tl.store(sums + 6 * n_tiles + tile, tl.sum(kl_terms(p_s, d, prob_diff), 0))
        tl.store(sums + 7 * n_tiles + tile, tl.max(top1_match, 0))

    u, v = d, -d  # log m - log p_s, log m - log p_t
    if DIVERGENCE == MIXTURE:
        u, v = mixture_log_ratios(d, beta, one_minus_beta)
    if WANT_SUMS:
        if DIVERGENCE != FORWARD_KL:
            tl.store(sums + tile, tl.sum(kl_terms(p_s, u, beta * prob_diff), 0))
        if DIVERGENCE != REVERSE_KL:
            tl.store(sums + n_tiles + tile, tl.sum(kl_terms(p_t, v, -one_minus_beta * prob_diff), 0))

    residual = p_s * 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        max_y, sum_y = _combine(parts + 5 * n_tiles, n_tiles, tiles)
        at_label = columns == label
        if WANT_SUMS:
            nll = tl.where(at_label, tl.log(sum_y) + (max_y - y_s), 0.0)
            tl.store(sums + 2 * n_tiles + tile, tl.sum(nll, 0))
        residual = tl.exp(y_s - max_y) / sum_y - tl.where(at_label, 1.0, 0.0)
        residual = tl.where(label >= 0, hard_weight * residual, 0.0)

    if WRITE_GRAD:
        if DIVERGENCE == FORWARD_KL:
            grad = -prob_diff
        else:
            kl = tl.sum(tl.load(sums + tiles, mask=tiles < n_tiles, other=0.0), 0)
            grad = mul_zero_safe(p_s, -u - kl)
            if DIVERGENCE == MIXTURE:
                grad *= one_minus_beta
        grad = (grad * (inv_temperature * soft_weight) + residual) * dlogit_dproj * tl.load(weight_ptr + row)
        out = grad_ptr + row * grad_stride + columns
        tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine(parts, n_tiles, tiles):
    """Return a row's maximum and sum of exponentials from those of its tiles."""
    maxima = tl.load(parts + tiles, mask=tiles < n_tiles, other=float("-inf"))
    sums = tl.load(parts + n_tiles + tiles, mask=tiles < n_tiles, other=0.0)
    max_logit = tl.max(maxima, 0)
    return max_logit, tl.sum(sums * exp_sub_max(maxima, max_logit), 0)


@triton.jit
def _diff_sum(parts, n_tiles, tiles, max_s, max_t):
    """Return a row's sum of probability differences from those of its tiles; see `lse_difference`."""
    held = tiles < n_tiles
    tile_maxima = tl.maximum(
        tl.load(parts + tiles, mask=held, other=float("-inf")),
        tl.load(parts + 2 * n_tiles + tiles, mask=held, other=float("-inf")),
    )
    diffs = tl.load(parts + 4 * n_tiles + tiles, mask=held, other=0.0)
    return tl.sum(diffs * exp_sub_max(tile_maxima, tl.maximum(max_s, max_t)), 0)


def jsd_rows(
    student_logits: Tensor,  # (n, V) float32, columns contiguous
    teacher_logits: Tensor,  # (n, V) float32, columns contiguous
    weight: Tensor,  # (n,) float32
    config: LossConfig,
    *,
    student_bias: Tensor | None,  # (V,) float32
    teacher_bias: Tensor | None,  # (V,) float32
    labels: Tensor | None,  # (n,) int64; -100: no label; V or more: not a column
    grad: Tensor | None,  # (n, V) any float dtype, may be student_logits: receives the weighted gradient
    on_statistics: Callable[[Tensor], None] | None = None,
    on_sums: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return row sums (n, 8) in float32 in the order of SUMS; entries that were not requested are 0.

    Where the columns are a shard of the vocabulary, on_statistics all-reduces the table (n, STATISTICS,
    tiles) and on_sums the table (n, SUMS, tiles), in place, before a later launch reads them.
    """
    n, n_columns = student_logits.shape
    n_tiles = triton.cdiv(n_columns, BLOCK)
    statistics = student_logits.new_empty(n, STATISTICS.value, n_tiles)
    sums = student_logits.new_zeros(n, SUMS.value, n_tiles)
    if n == 0:
        return sums.sum(-1)
    unused = student_logits
    logits = (student_logits, student_logits.stride(0), teacher_logits, teacher_logits.stride(0))
    biases = (
        unused if student_bias is None else student_bias,
        unused if teacher_bias is None else teacher_bias,
    )
    transforms = (
        config.inv_temperature,
        config.student_logit_scale,
        config.teacher_logit_scale,
        config.student_softcap or 1.0,
        config.teacher_softcap or 1.0,
    )
    flags = {
        "HAS_STUDENT_BIAS": student_bias is not None,
        "HAS_TEACHER_BIAS": teacher_bias is not None,
        "HAS_STUDENT_SOFTCAP": config.student_softcap is not None,
        "HAS_TEACHER_SOFTCAP": config.teacher_softcap is not None,
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
            float(config.beta),
            config.one_minus_beta,
            *transforms,
            config.hard_weight,
            config.soft_weight,
            DIVERGENCE=int(config.divergence),
            WANT_SUMS=want_sums,
            WANT_STATS=want_sums and config.return_stats,
            WRITE_GRAD=write_grad,
            TILES=triton.next_power_of_2(n_tiles),
            num_warps=num_warps(want_sums and config.return_stats),
            **flags,
        )

    with torch.cuda.device_of(student_logits):
        statistics_launch: Any = statistics_kernel[grid]
        statistics_launch(
            *logits, *biases, statistics, n_columns, n_tiles, *transforms, **flags, num_warps=num_warps(False)
        )
        if on_statistics is not None:
            on_statistics(statistics)
        one_pass = grad is not None and config.divergence == FORWARD_KL.value
        divergence_pass(want_sums=True, write_grad=one_pass)
        if on_sums is not None:
            on_sums(sums)
        if grad is not None and not one_pass:
            divergence_pass(want_sums=False, write_grad=True)
    return sums.sum(-1)
