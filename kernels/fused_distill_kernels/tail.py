"""Row kernels over the columns outside a top-k support, in a chunk of float32 logits with -inf inside it.

Both kernels run on a grid of (rows, tiles), one program for one tile of BLOCK columns of one row:

    tail_statistics_kernel   maximum and sum of exponentials of the student's logits
    tail_gradient_kernel     the gradient: the softmax within the tail, times one factor per row

Neither kernel depends on the divergence, which is computed between the two from K + 1 numbers per row.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import exp_sub_max, load_logits
from .jsd_launch import BLOCK

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import LossConfig

NUM_WARPS = 8

# Partial sums of one tile.
STATISTICS = tl.constexpr(4)  # max_z, sum_z, max_y, sum_y


@triton.jit
def tail_statistics_kernel(
    logits_ptr,  # (n, V) float32
    logits_stride,
    bias_ptr,  # (V,) float32
    statistics_ptr,  # (n, STATISTICS, n_tiles) float32, written
    n_columns,
    n_tiles,
    inv_temperature,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one tile's log-sum-exp parts, with WANT_Y those at temperature 1 too.

    Reads 4 bytes per column, and 4 more with a bias. Writes 8 bytes per tile, or 16 with WANT_Y.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y, _ = load_logits(
        logits_ptr + row * logits_stride, bias_ptr, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    z = y * inv_temperature
    max_logit = tl.max(z, 0)
    out = statistics_ptr + row * (STATISTICS * n_tiles) + tile
    tl.store(out, max_logit)
    tl.store(out + n_tiles, tl.sum(exp_sub_max(z, max_logit), 0))
    if WANT_Y:
        max_logit = tl.max(y, 0)
        tl.store(out + 2 * n_tiles, max_logit)
        tl.store(out + 3 * n_tiles, tl.sum(exp_sub_max(y, max_logit), 0))


@triton.jit
def tail_gradient_kernel(
    logits_ptr,  # (n, V) float32
    logits_stride,
    bias_ptr,  # (V,) float32
    rows_ptr,  # (n, 4) float32: max_z, factor_z, max_y, factor_y
    grad_ptr,  # (n, V), written; may be logits_ptr
    grad_stride,
    n_columns,
    inv_temperature,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one tile of dlogit_dproj * (factor_z e^(z - max_z) + factor_y e^(y - max_y)).

    Reads 4 bytes per column, 4 more with a bias, and 8 bytes of the row, or 16 with WANT_Y. Writes one
    gradient element per column.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y, dlogit_dproj = load_logits(
        logits_ptr + row * logits_stride, bias_ptr, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    row_ptr = rows_ptr + 4 * row
    grad = tl.load(row_ptr + 1) * exp_sub_max(y * inv_temperature, tl.load(row_ptr))
    if WANT_Y:
        grad += tl.load(row_ptr + 3) * exp_sub_max(y, tl.load(row_ptr + 2))
    out = grad_ptr + row * grad_stride + columns
    tl.store(out, (grad * dlogit_dproj).to(grad_ptr.dtype.element_ty), mask=inside)


def tail_sums(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    config: LossConfig,
    *,
    bias: Tensor | None,  # (V,) float32
    want_y: bool,
) -> Tensor:
    """Return float32 log-sum-exp parts (n, 4, tiles) in the order of STATISTICS, the last two if want_y."""
    n, n_columns = logits.shape
    n_tiles = triton.cdiv(n_columns, BLOCK)
    statistics = logits.new_empty(n, STATISTICS.value, n_tiles)
    _launch(tail_statistics_kernel, logits, bias, (statistics, n_columns, n_tiles), config, want_y)
    return statistics


def tail_gradient(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    rows: Tensor,  # (n, 4) float32, contiguous: max_z, factor_z, max_y, factor_y
    grad: Tensor,  # (n, V) any float dtype, may be logits: written
    config: LossConfig,
    *,
    bias: Tensor | None,  # (V,) float32
    want_y: bool,
) -> None:
    """Write the gradient of every column of the tail to grad, and 0 in the support."""
    arguments = (rows, grad, grad.stride(0), logits.shape[1])
    _launch(tail_gradient_kernel, logits, bias, arguments, config, want_y)


def _launch(
    kernel: Any,
    logits: Tensor,
    bias: Tensor | None,
    arguments: tuple[Any, ...],  # the kernel's arguments between the bias and the transform
    config: LossConfig,
    want_y: bool,
) -> None:
    n, n_columns = logits.shape
    if n == 0:
        return
    with torch.cuda.device_of(logits):
        kernel[(n, triton.cdiv(n_columns, BLOCK))](
            logits,
            logits.stride(0),
            logits if bias is None else bias,
            *arguments,
            config.inv_temperature,
            config.student_logit_scale,
            config.student_softcap or 1.0,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=config.student_softcap is not None,
            WANT_Y=want_y,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
