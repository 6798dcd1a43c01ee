"""Matrix product of half-precision matrices with a float32 result, for GPUs whose library has none.

The vendors' libraries compute it faster. ROCm has it from torch 2.10 on.
"""

# The parameters of Triton kernels have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
NUM_WARPS, NUM_STAGES = 8, 2
ROW_BLOCKS_PER_GROUP = 8


@triton.jit
def matmul_kernel(
    a_ptr,  # (m, k) float16 / bfloat16
    a_row_stride,
    a_column_stride,
    b_ptr,  # (k, n) in the dtype of a
    b_row_stride,
    b_column_stride,
    out_ptr,  # (m, n) float32, written; also read if ACCUMULATE
    out_row_stride,
    out_column_stride,
    m,
    n,
    k,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one (BLOCK_M, BLOCK_N) block of a @ b, and add it to the block of out if ACCUMULATE.

    Reads 2 k (BLOCK_M + BLOCK_N) bytes of a and b, and 4 BLOCK_M BLOCK_N bytes of out if ACCUMULATE. Writes
    4 BLOCK_M BLOCK_N bytes. Consecutive programs take GROUP blocks of rows for each block of columns, so that
    they find blocks of a and b in the L2 cache.
    """
    row_blocks, column_blocks = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program, per_group = tl.program_id(0), GROUP * column_blocks
    first_row_block = program // per_group * GROUP
    group_rows = tl.minimum(row_blocks - first_row_block, GROUP)
    row_block = first_row_block + program % per_group % group_rows
    column_block = program % per_group // group_rows

    # Offsets in int64: rows times row stride exceeds 2^31.
    rows = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = (column_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows * a_row_stride + inner[None, :].to(tl.int64) * a_column_stride
    b_ptrs = b_ptr + inner[:, None].to(tl.int64) * b_row_stride + columns * b_column_stride
    inside = (rows < m) & (columns < n)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        left = k - start
        a = tl.load(a_ptrs, mask=(rows < m) & (inner[None, :] < left), other=0.0)
        b = tl.load(b_ptrs, mask=(inner[:, None] < left) & (columns < n), other=0.0)
        total = tl.dot(a, b, total)
        a_ptrs += BLOCK_K * a_column_stride
        b_ptrs += BLOCK_K * b_row_stride

    out_ptrs = out_ptr + rows * out_row_stride + columns * out_column_stride
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, total, mask=inside)


def matmul(
    a: Tensor,  # (m, k) float16 / bfloat16, any strides
    b: Tensor,  # (k, n) in the dtype of a, any strides
    out: Tensor,  # (m, n) float32, any strides
    accumulate: bool = False,
) -> None:
    """Compute out = a @ b, or out += a @ b, accumulated in float32."""
    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return
    programs = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N)
    launch: Any = matmul_kernel[(programs,)]
    with torch.cuda.device_of(out):
        launch(
            a,
            *a.stride(),
            b,
            *b.stride(),
            out,
            *out.stride(),
            m,
            n,
            k,
            ACCUMULATE=accumulate,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP=ROW_BLOCKS_PER_GROUP,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
