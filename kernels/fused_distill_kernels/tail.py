"""Row kernels over the columns outside a top-k support, in a chunk of float32 logits with -inf inside it.

Both kernels run on a grid of (rows, tiles), one program for one tile of BLOCK columns of one row:

    rest_statistics_kernel   maximum and sum of exponentials of the student's logits
    rest_gradient_kernel     the gradient, a factor of the row times its softmax

Two passes over the logits, whatever the divergence: what depends on it has K + 1 numbers per row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import exp_below, load_logits
from .jsd import BLOCK

NUM_WARPS = 8

# Partial sums of one tile, one row of the table that the statistics kernel hands on.
STATISTICS = tl.constexpr(4)  # max_z, sum_z, max_y, sum_y


@triton.jit
def rest_statistics_kernel(
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
    """One tile's log-sum-exp parts, with WANT_Y those at temperature 1 too.

    Reads 4 bytes a column, writes 8 or 16 a tile.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y, _ = load_logits(
        logits_ptr + row * logits_stride, bias_ptr, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    z = y * inv_temperature
    top = tl.max(z, 0)
    out = statistics_ptr + row * (STATISTICS * n_tiles) + tile
    tl.store(out, top)
    tl.store(out + n_tiles, tl.sum(exp_below(z, top), 0))
    if WANT_Y:
        top = tl.max(y, 0)
        tl.store(out + 2 * n_tiles, top)
        tl.store(out + 3 * n_tiles, tl.sum(exp_below(y, top), 0))


@triton.jit
def rest_gradient_kernel(
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
    """One tile of slope * (factor_z e^(z - max_z) + factor_y e^(y - max_y)).

    Reads 4 bytes a column, writes one gradient element a column.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    y, slope = load_logits(
        logits_ptr + row * logits_stride, bias_ptr, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    of_row = rows_ptr + 4 * row
    grad = tl.load(of_row + 1) * exp_below(y * inv_temperature, tl.load(of_row))
    if WANT_Y:
        grad += tl.load(of_row + 3) * exp_below(y, tl.load(of_row + 2))
    out = grad_ptr + row * grad_stride + columns
    tl.store(out, (grad * slope).to(grad_ptr.dtype.element_ty), mask=inside)


def rest_sums(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    *,
    bias: Tensor | None,  # (V,) float32
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_y: bool,
) -> Tensor:
    """Log-sum-exp parts (n, 4, tiles) in float32 in the order of STATISTICS; the last two only if want_y."""
    n, n_columns = logits.shape
    n_tiles = triton.cdiv(n_columns, BLOCK)
    statistics = logits.new_empty(n, STATISTICS.value, n_tiles)
    sizes = (statistics, n_columns, n_tiles)
    _launch(rest_statistics_kernel, logits, bias, sizes, temperature, logit_scale, softcap, want_y)
    return statistics


def rest_gradients(
    logits: Tensor,  # (n, V) float32, columns contiguous, -inf in the columns of the support
    rows: Tensor,  # (n, 4) float32, contiguous: max_z, factor_z, max_y, factor_y
    grad: Tensor,  # (n, V) any float dtype, may be logits: written
    *,
    bias: Tensor | None,  # (V,) float32
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_y: bool,
) -> None:
    """The gradient of every column outside the support, 0 inside."""
    own = (rows, grad, grad.stride(0), logits.shape[1])
    _launch(rest_gradient_kernel, logits, bias, own, temperature, logit_scale, softcap, want_y)


def _launch(
    kernel: Any,
    logits: Tensor,
    bias: Tensor | None,
    own: tuple[Any, ...],  # the kernel's arguments between the bias and the transform
    temperature: float,
    logit_scale: float,
    softcap: float | None,
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
            *own,
            1.0 / temperature,
            logit_scale,
            softcap or 1.0,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            WANT_Y=want_y,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
