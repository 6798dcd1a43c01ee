"""Row kernels that read and write the K columns of a top-k support, one program for one row.

unique_entries_kernel  the entries' columns on this rank, without repeated ids
take_support_kernel    the student's logits there, which are set to -inf in the row, and at the label
put_support_kernel     the gradient there, and at the label
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise64 import from_parts, transform_logits

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import LossConfig

_MAX_BLOCK = 128  # entries held in registers at once
EARLIER = 32  # entries compared with a block at once
# A log-probability up to here is that of an absent entry, as in fused_distill.validation.
FORBIDDEN = tl.constexpr(-9984.0)


def support_block(k: int) -> int:
    """Return how many entries a program holds at once."""
    return min(triton.next_power_of_2(k), _MAX_BLOCK)


def support_warps(block: int) -> int:
    """Return the warps of a program that holds `block` entries: one entry per thread of an NVIDIA GPU."""
    return max(1, block // 32)


def float_parts(value: float) -> tuple[float, float]:
    """Return value's first 24 bits, which float32 holds, and the rest, see `from_parts`."""
    shifted = value * (2.0**29 + 1)
    high = shifted - (shifted - value)
    return high, value - high


@triton.jit
def unique_entries_kernel(
    ids_ptr,  # (N, K) int
    ids_stride,
    ids_step,
    logprobs_ptr,  # (N, K) float
    logprobs_stride,
    logprobs_step,
    tokens_ptr,  # (n,) int64 rows of ids and logprobs
    columns_ptr,  # (n, K) int64, written
    unique_ptr,  # (n, K) like logprobs, written
    k,
    first_column,
    n_columns,
    HAS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLIER: tl.constexpr,
):
    """Write a block of columns, -1 where absent or elsewhere, and log-probabilities, -inf where not counted.

    Compares each entry with all before it. Reads and writes 16 bytes or less per entry.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = row
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
    ids_ptr += token * ids_stride
    logprobs_ptr += token * logprobs_stride
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < k
    ids = tl.load(ids_ptr + index * ids_step, mask=inside, other=0)
    logprob = tl.load(logprobs_ptr + index * logprobs_step, mask=inside, other=float("-inf"))
    repeats = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.minimum(k, (block + 1) * BLOCK), EARLIER):
        earlier = start + tl.arange(0, EARLIER)
        earlier_ids = tl.load(ids_ptr + earlier * ids_step, mask=earlier < k, other=0).to(tl.int32)
        earlier_logprob = tl.load(
            logprobs_ptr + earlier * logprobs_step, mask=earlier < k, other=float("-inf")
        )
        present = ~(earlier_logprob.to(tl.float32) <= FORBIDDEN)
        same = (ids.to(tl.int32)[:, None] == earlier_ids[None, :]) & (earlier[None, :] < index[:, None])
        repeats += tl.sum((same & present[None, :]).to(tl.int32), 1)
    absent = (repeats > 0) | (logprob.to(tl.float32) <= FORBIDDEN)
    logprob = tl.where(absent, float("-inf"), logprob)
    column = ids.to(tl.int64) - first_column
    here = ~absent & (column >= 0) & (column < n_columns)
    tl.store(columns_ptr + row * k + index, tl.where(here, column, -1), mask=inside)
    tl.store(unique_ptr + row * k + index, logprob, mask=inside)


@triton.jit
def take_support_kernel(
    logits_ptr,  # (n, V) float32, with GATHER -inf is written to the support; without it (n, K)
    logits_stride,
    bias_ptr,  # (V,) float32
    columns_ptr,  # (n, K) int64, negative where absent or on another rank
    logprobs_ptr,  # (n, K) float, -inf where absent
    labels_ptr,  # (n,) int64
    y_ptr,  # (n, K) float64, written
    label_y_ptr,  # (n,) float64, written
    k,
    n_columns,
    scale,
    scale_low,
    softcap,
    softcap_low,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's logits at temperature 1: -inf where absent, and 0 for a column of another rank.

    Reads 20 bytes per entry and writes 8, or 12 with GATHER.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    columns_ptr += row * k
    scale, softcap = from_parts(scale, scale_low), from_parts(softcap, softcap_low)
    for start in range(0, k, BLOCK):
        index = start + tl.arange(0, BLOCK)
        column = tl.load(columns_ptr + index, mask=index < k, other=-1)
        here = column >= 0
        x = tl.load(logits_ptr + (column if GATHER else index), mask=here, other=0.0).to(tl.float64)
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=here, other=0.0)
        y = transform_logits(x, scale, softcap, HAS_SOFTCAP)
        logprob = tl.load(logprobs_ptr + row * k + index, mask=index < k, other=float("-inf"))
        elsewhere = tl.where(logprob == float("-inf"), float("-inf"), 0.0)
        tl.store(y_ptr + row * k + index, tl.where(here, y, elsewhere), mask=index < k)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        here = (label >= 0) & (label < n_columns)
        x = tl.load(logits_ptr + label, mask=here, other=0.0).to(tl.float64)
        if HAS_BIAS:
            x += tl.load(bias_ptr + label, mask=here, other=0.0)
        y = transform_logits(x, scale, softcap, HAS_SOFTCAP)
        tl.store(label_y_ptr + row, tl.where(here, y, 0.0))
    if GATHER:
        tl.debug_barrier()  # all threads have read the logits
        for start in range(0, k, BLOCK):
            index = start + tl.arange(0, BLOCK)
            column = tl.load(columns_ptr + index, mask=index < k, other=-1)
            tl.store(logits_ptr + column, float("-inf"), mask=column >= 0)


@triton.jit
def put_support_kernel(
    grad_ptr,  # (n, V) any float, written
    grad_stride,
    columns_ptr,  # (n, K) int64, negative where absent or on another rank
    support_grad_ptr,  # (n, K) like grad
    labels_ptr,  # (n,) int64
    label_grad_ptr,  # (n,) like grad
    k,
    n_columns,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient at the columns of the support, and at its label unless that is among them.

    Reads 10 to 12 bytes per entry and writes 2 to 4.
    """
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    label = -1
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    at_label = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        index = start + tl.arange(0, BLOCK)
        column = tl.load(columns_ptr + row * k + index, mask=index < k, other=-1)
        grad = tl.load(support_grad_ptr + row * k + index, mask=index < k, other=0.0)
        tl.store(grad_ptr + column, grad, mask=column >= 0)
        at_label |= ((column == label) & (column >= 0)).to(tl.int32)
    if HAS_LABELS:
        in_tail = (tl.max(at_label, 0) == 0) & (label >= 0) & (label < n_columns)
        tl.store(grad_ptr + label, tl.load(label_grad_ptr + row), mask=in_tail)


def unique_entries(
    ids: Tensor,  # (N, K) int
    logprobs: Tensor,  # (N, K) float
    tokens: Tensor | None,  # (n,) int64 rows to read; None: all
    first_column: int,
    n_columns: int,
) -> tuple[Tensor, Tensor]:
    """Return columns (n, K) int64, -1 unless on this rank, and log-probabilities, -inf if repeated."""
    n, k = len(ids if tokens is None else tokens), ids.shape[1]
    columns = torch.empty(n, k, dtype=torch.int64, device=ids.device)
    unique = torch.empty(n, k, dtype=logprobs.dtype, device=ids.device)
    if n:
        block = support_block(k)
        grid = (n, triton.cdiv(k, block))
        with torch.cuda.device_of(ids):
            launch: Any = unique_entries_kernel[grid]
            launch(
                ids,
                *ids.stride(),
                logprobs,
                *logprobs.stride(),
                ids if tokens is None else tokens,
                columns,
                unique,
                k,
                first_column,
                n_columns,
                HAS_TOKENS=tokens is not None,
                BLOCK=block,
                EARLIER=EARLIER,
                num_warps=support_warps(block),
                enable_fp_fusion=True,
            )
    return columns, unique


def take_support(
    logits: Tensor,  # (n, V) float32, -inf is written to the support; or (n, K), which is only read
    columns: Tensor,  # (n, K) int64, negative where absent or on another rank
    logprobs: Tensor,  # (n, K) float, -inf where absent
    config: LossConfig,
    *,
    bias: Tensor | None,  # (V,) float32
    labels: Tensor | None,  # (n,) int64
    gather: bool,  # logits are those of the vocabulary
) -> tuple[Tensor, Tensor | None]:
    """Return float64 logits at temperature 1 of the support (n, K), and of the labels (n,).

    They are -inf for an absent entry, and 0 for a column of another rank.
    """
    n, k = columns.shape
    y = torch.empty(n, k, dtype=torch.float64, device=logits.device)
    label_y = None if labels is None else y.new_empty(n)
    if n:
        block = support_block(k)
        with torch.cuda.device_of(logits):
            launch: Any = take_support_kernel[(n,)]
            launch(
                logits,
                logits.stride(0),
                logits if bias is None else bias,
                columns,
                logprobs,
                columns if labels is None else labels,
                y,
                y if label_y is None else label_y,
                k,
                logits.shape[1],
                *float_parts(config.student_logit_scale),
                *float_parts(config.student_softcap or 1.0),
                GATHER=gather,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=config.student_softcap is not None,
                HAS_LABELS=labels is not None,
                BLOCK=block,
                num_warps=support_warps(block),
                enable_fp_fusion=True,
            )
    return y, label_y


def put_support(
    grad: Tensor,  # (n, V) any float, written at the support and the labels
    columns: Tensor,  # (n, K) int64, negative where absent or on another rank
    support_grad: Tensor,  # (n, K) like grad
    *,
    labels: Tensor | None,  # (n,) int64
    label_grad: Tensor | None,  # (n,) like grad
) -> None:
    """Write the gradient of the support's columns, and of the labels that lie in the tail."""
    n, k = columns.shape
    if n == 0:
        return
    block = support_block(k)
    with torch.cuda.device_of(grad):
        launch: Any = put_support_kernel[(n,)]
        launch(
            grad,
            grad.stride(0),
            columns,
            support_grad,
            columns if labels is None else labels,
            support_grad if label_grad is None else label_grad,
            k,
            grad.shape[1],
            HAS_LABELS=labels is not None,
            BLOCK=block,
            num_warps=support_warps(block),
            enable_fp_fusion=True,
        )
