"""Row kernels over the columns outside a top-k support, in a chunk of float32 logits with -inf inside it.

Both kernels run on a grid of (rows, parts), at most MAX_PARTS programs for one row. A program loops over
tiles of BLOCK columns:

    tail_statistics_kernel   maximum and sum of exponentials of the student's logits
    tail_gradient_kernel     the gradient: the softmax within the tail, times one factor per row

Neither kernel depends on the divergence, which `support_loss_kernel` computes between the two.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import LN_2, LOG2_E, LOG2_E_LOW, exp_sub_max
from .launch import MAX_PARTS, launch_options
from .tile import load_logits, rest_of_part

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import LossConfig

BLOCK = 2048  # columns of a tile

# Numbers of one part of a row.
STATISTICS = tl.constexpr(4)  # max_z, others_z, max_y, others_y

MIN_EXPONENT = tl.constexpr(-200.0)  # e^x is 0 in float32
LOWEST = tl.constexpr(-3.0e38)  # a finite maximum of nothing, so that no difference is NaN


@triton.jit
def exp_of_negative(x):
    """Return e^x for x <= 0, with the rounding of log2(e) and of its product with x put right.

    Else all terms of a sum would be wrong in one direction, and so would the sum.
    """
    x = tl.where(x < MIN_EXPONENT, MIN_EXPONENT, x)  # keeps NaN, as tl.maximum does not
    power = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -power) + x * LOG2_E_LOW
    value = tl.math.exp2(power)
    return value + value * (rest * LN_2)


@triton.jit
def add_logits(z, highest, others):
    """Take one logit per lane into the lane's maximum and sum of e^(z - maximum) without the maximum's 1."""
    gap = z - highest
    e = exp_of_negative(-tl.abs(gap))
    # The former maximum's 1 becomes e, and so does all that was summed relative to it.
    return tl.maximum(highest, z), others * tl.where(gap > 0, e, 1.0) + e


@triton.jit
def store_parts(out, n_parts, highest, others, BLOCK: tl.constexpr):
    """Store the maximum over all lanes, and the sum of e^(z - maximum) without the maximum's 1.

    That 1 would hide the other exponentials of a confident model, which may sum to 1e-9. Lanes are added in
    float64: rounding errors of lanes and of terms average out, those of a sum do not.
    """
    top, lane = tl.max(highest, 0), tl.argmax(highest, 0)
    of_lane = tl.where(highest == LOWEST, 0.0, exp_of_negative(highest - top))
    of_maximum = tl.where(tl.arange(0, BLOCK) == lane, 0.0, of_lane)
    total = tl.sum((others * of_lane).to(tl.float64) + of_maximum, 0)
    tl.store(out, tl.where(top == LOWEST, float("-inf"), top))
    tl.store(out + n_parts, total)


@triton.jit
def tail_statistics_kernel(
    logits_ptr,  # (n, V) float32
    logits_stride,
    bias_ptr,  # (V,) float32 or None
    statistics_ptr,  # (n, STATISTICS, n_parts) float64, written
    n_columns,
    n_parts,
    inv_temperature,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WANT_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one part's log-sum-exp parts, with WANT_Y those at temperature 1 too.

    Reads 4 bytes per column, and 4 more with a bias. Writes 16 bytes, or 32 with WANT_Y.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits_ptr += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    highest_z, others_z = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    highest_y, others_y = highest_z, others_z
    for MASKED in tl.static_range(2):
        first, stop = part, n_columns // BLOCK
        if MASKED:
            first, stop = rest_of_part(part, n_parts, n_columns, BLOCK, BLOCK)
        for tile in range(first, stop, n_parts):
            columns = tile * BLOCK + lanes
            y, _ = load_logits(logits_ptr, bias_ptr, columns, n_columns, scale, softcap, HAS_SOFTCAP, MASKED)
            highest_z, others_z = add_logits(y * inv_temperature, highest_z, others_z)
            if WANT_Y:
                highest_y, others_y = add_logits(y, highest_y, others_y)
    out = statistics_ptr + row * (STATISTICS * n_parts) + part
    store_parts(out, n_parts, highest_z, others_z, BLOCK)
    if WANT_Y:
        store_parts(out + 2 * n_parts, n_parts, highest_y, others_y, BLOCK)


@triton.jit
def tail_gradient_kernel(
    logits_ptr,  # (n, V) float32
    logits_stride,
    bias_ptr,  # (V,) float32 or None
    factors_ptr,  # (n, 4) float32: max_z, factor_z, max_y, factor_y
    grad_ptr,  # (n, V), written; may be logits_ptr
    grad_stride,
    n_columns,
    n_parts,
    inv_temperature,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WANT_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a part of dlogit_dproj * (factor_z e^(z - max_z) + factor_y e^(y - max_y)), 0 where y is -inf.

    Reads 4 bytes per column, 4 more with a bias, and 8 bytes of the row, or 16 with WANT_Y. Writes one
    gradient element per column.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    factors_ptr += 4 * row
    max_z, factor_z = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    max_y, factor_y = max_z, factor_z
    if WANT_Y:
        max_y, factor_y = tl.load(factors_ptr + 2), tl.load(factors_ptr + 3)
    for MASKED in tl.static_range(2):
        first, stop = part, n_columns // BLOCK
        if MASKED:
            first, stop = rest_of_part(part, n_parts, n_columns, BLOCK, BLOCK)
        for tile in range(first, stop, n_parts):
            columns = tile * BLOCK + tl.arange(0, BLOCK)
            y, dlogit_dproj = load_logits(
                logits_ptr, bias_ptr, columns, n_columns, scale, softcap, HAS_SOFTCAP, MASKED
            )
            grad = factor_z * exp_sub_max(y * inv_temperature, max_z)
            if WANT_Y:
                grad += factor_y * exp_sub_max(y, max_y)
            grad = (grad * dlogit_dproj).to(grad_ptr.dtype.element_ty)
            if MASKED:
                tl.store(grad_ptr + columns, grad, mask=columns < n_columns)
            else:
                tl.store(grad_ptr + columns, grad)


def tail_sums(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    config: LossConfig,
    *,
    bias: Tensor | None,  # (V,) float32
    want_y: bool,
) -> Tensor:
    """Return float64 log-sum-exp parts (n, 4, parts) in the order of STATISTICS, the last two if want_y.

    A part's maximum is -inf if it has no column but those of the support. Its other number is the sum of
    e^(z - maximum) over all columns but the maximum's.
    """
    shape = len(logits), STATISTICS.value, _n_parts(logits)
    statistics = torch.empty(shape, dtype=torch.float64, device=logits.device)
    _launch(tail_statistics_kernel, logits, bias, (statistics,), config, want_y)
    return statistics


def tail_gradient(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    factors: Tensor,  # (n, 4) float32, contiguous: max_z, factor_z, max_y, factor_y
    grad: Tensor,  # (n, V) any float dtype, may be logits: written
    config: LossConfig,
    *,
    bias: Tensor | None,  # (V,) float32
    want_y: bool,
) -> None:
    """Write the gradient of every column of the tail to grad, and 0 in the support."""
    _launch(tail_gradient_kernel, logits, bias, (factors, grad, grad.stride(0)), config, want_y)


def _n_parts(logits: Tensor) -> int:
    return min(MAX_PARTS, triton.cdiv(logits.shape[1], BLOCK))


def _launch(
    kernel: Any,
    logits: Tensor,
    bias: Tensor | None,
    arguments: tuple[Any, ...],  # the kernel's arguments between the bias and the sizes
    config: LossConfig,
    want_y: bool,
) -> None:
    n, n_columns = logits.shape
    if n == 0:
        return
    n_parts = _n_parts(logits)
    with torch.cuda.device_of(logits):
        kernel[(n, n_parts)](
            logits,
            logits.stride(0),
            bias,
            *arguments,
            n_columns,
            n_parts,
            float(config.inv_temperature),
            float(config.student_logit_scale),
            float(config.student_softcap or 1.0),
            HAS_SOFTCAP=config.student_softcap is not None,
            WANT_Y=want_y,
            BLOCK=BLOCK,
            **launch_options(logits.device),
        )
