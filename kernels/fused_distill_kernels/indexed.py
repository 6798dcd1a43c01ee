"""Products of hidden states with the rows of an LM head at K columns per token, and their gradients.

    indexed_project_kernel          logits at the K columns
    indexed_back_project_kernel     gradient of the hidden states
    indexed_weight_gradient_kernel  gradient of the head's rows, in a fixed order and without atomics

The head is read in the dtype and layout in which it is stored. Sums are float32. A negative column counts as
absent.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 8  # rows of the head, or of the hidden states, that a program reads at once
WIDTH = 512  # of a row's elements
NUM_WARPS = 4


@triton.jit
def indexed_project_kernel(
    hidden_ptr,  # (n, D) float
    hidden_stride,
    hidden_element_stride,
    weight_ptr,  # (V, D) float
    weight_stride,
    weight_element_stride,
    columns_ptr,  # (n, K) int64
    out_ptr,  # (n, K) float32, written
    out_stride,
    k,
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute one token's logits at ENTRIES of its columns. Reads these rows of the head once."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.load(columns_ptr + token * k + index, mask=index < k, other=-1)
    rows = weight_ptr + column[:, None] * weight_stride
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        element = (start + tl.arange(0, WIDTH)).to(tl.int64)
        hidden = hidden_ptr + token * hidden_stride + element * hidden_element_stride
        hidden = tl.load(hidden, mask=element < width, other=0.0)
        inside = (column >= 0)[:, None] & (element < width)[None, :]
        weight = rows + element[None, :] * weight_element_stride
        weight = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        total += weight * hidden.to(tl.float32)[None, :]
    tl.store(out_ptr + token * out_stride + index, tl.sum(total, 1), mask=index < k)


@triton.jit
def indexed_back_project_kernel(
    grad_ptr,  # (n, K) float32
    grad_stride,
    weight_ptr,  # (V, D) float
    weight_stride,
    weight_element_stride,
    columns_ptr,  # (n, K) int64
    out_ptr,  # (n, D) float32, written
    out_stride,
    out_element_stride,
    k,
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute WIDTH elements of one token's sum of grad times the head's row. Reads these elements once."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = (block * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, k, ENTRIES):
        index = start + tl.arange(0, ENTRIES)
        column = tl.load(columns_ptr + token * k + index, mask=index < k, other=-1)
        grad = tl.load(grad_ptr + token * grad_stride + index, mask=column >= 0, other=0.0)
        inside = (column >= 0)[:, None] & (element < width)[None, :]
        weight = weight_ptr + column[:, None] * weight_stride + element[None, :] * weight_element_stride
        total += grad[:, None] * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + token * out_stride + element * out_element_stride
    tl.store(out, tl.sum(total, 0), mask=element < width)


@triton.jit
def indexed_weight_gradient_kernel(
    sorted_columns_ptr,  # (n K,) int64, ascending
    order_ptr,  # (n K,) int64: the entries' positions before sorting
    grad_ptr,  # (n, K) float32
    grad_stride,
    hidden_ptr,  # (n, D) float
    hidden_stride,
    hidden_element_stride,
    out_ptr,  # (V, D) float32, added to
    out_stride,
    out_element_stride,
    n_entries,
    k,
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add grad times hidden state over all entries of one column to WIDTH elements of its row.

    The program of the column's first entry does so, the others of that column do nothing. Reads each entry's
    hidden state once; reads and writes each row that occurs once.
    """
    first, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.load(sorted_columns_ptr + first)
    before = tl.load(sorted_columns_ptr + first - 1, mask=first > 0, other=-1)
    if (column >= 0) & (column != before):
        element = (block * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
        total = tl.zeros((ENTRIES, WIDTH), tl.float32)
        position, more = first, True
        while more:
            entry = position + tl.arange(0, ENTRIES)
            inside = entry < n_entries
            same = tl.load(sorted_columns_ptr + entry, mask=inside, other=-1) == column
            source = tl.load(order_ptr + entry, mask=same, other=0)
            token = source // k
            grad = tl.load(grad_ptr + token * grad_stride + source % k, mask=same, other=0.0)
            hidden = hidden_ptr + token[:, None] * hidden_stride + element[None, :] * hidden_element_stride
            mask = same[:, None] & (element < width)[None, :]
            total += grad[:, None] * tl.load(hidden, mask=mask, other=0.0).to(tl.float32)
            position += ENTRIES
            more = tl.sum(same.to(tl.int32), 0) == ENTRIES
        out = out_ptr + column * out_stride + element * out_element_stride
        sums = tl.load(out, mask=element < width, other=0.0) + tl.sum(total, 0)
        tl.store(out, sums, mask=element < width)


def indexed_project(
    hidden: Tensor,  # (n, D) float
    weight: Tensor,  # (V, D) float
    columns: Tensor,  # (n, K) int64, contiguous; negative: the logit is 0
    out: Tensor,  # (n, K) float32, written
) -> None:
    """Compute out[n, k] = hidden[n] . weight[columns[n, k]]."""
    (n, k), width = columns.shape, weight.shape[1]
    _launch(
        indexed_project_kernel,
        (n, triton.cdiv(k, ENTRIES)),
        hidden,
        *hidden.stride(),
        weight,
        *weight.stride(),
        columns,
        out,
        out.stride(0),
        k,
        width,
    )


def indexed_back_project(
    grad: Tensor,  # (n, K) float32
    weight: Tensor,  # (V, D) float
    columns: Tensor,  # (n, K) int64, contiguous; negative: without effect
    out: Tensor,  # (n, D) float32, written
) -> None:
    """Compute out[n] = sum over k of grad[n, k] weight[columns[n, k]]."""
    (n, k), width = columns.shape, weight.shape[1]
    _launch(
        indexed_back_project_kernel,
        (n, triton.cdiv(width, WIDTH)),
        grad,
        grad.stride(0),
        weight,
        *weight.stride(),
        columns,
        out,
        *out.stride(),
        k,
        width,
    )


def add_indexed_weight_gradient(
    grad: Tensor,  # (n, K) float32
    hidden: Tensor,  # (n, D) float
    sorted_columns: Tensor,  # (n K,) int64, ascending; negative: without effect
    order: Tensor,  # (n K,) int64: positions in the (n, K) entries
    out: Tensor,  # (V, D) float32, added to
) -> None:
    """Compute out[column of entry (n, k)] += grad[n, k] hidden[n]."""
    (n_entries,), width = sorted_columns.shape, hidden.shape[1]
    _launch(
        indexed_weight_gradient_kernel,
        (n_entries, triton.cdiv(width, WIDTH)),
        sorted_columns,
        order,
        grad,
        grad.stride(0),
        hidden,
        *hidden.stride(),
        out,
        *out.stride(),
        n_entries,
        grad.shape[1],
        width,
    )


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any) -> None:
    if grid[0]:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, ENTRIES=ENTRIES, WIDTH=WIDTH, num_warps=NUM_WARPS, enable_fp_fusion=True)
