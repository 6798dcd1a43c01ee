"""How many rows of logits are held at once: the workspace bound turned into chunk sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

_MIB = 1 << 20
_ROW_MULTIPLE = 64  # matrix products like row counts that fill their tiles


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of `rows` tokens; row arithmetic inside a chunk runs on blocks of `block_rows`."""

    n_tokens: int
    rows: int
    block_rows: int

    def chunks(self) -> Iterator[slice]:
        """The chunks, in order; an empty one if there is no token."""
        return blocks(self.n_tokens, self.rows)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover n in order; an empty one if n is 0."""
    for start in range(0, max(n, 1), size):
        yield slice(start, min(start + size, n))


def default_workspace_bytes(device_type: str, head_bytes: int) -> int:
    """1 GiB on an accelerator; on the CPU 256 MiB, or half the size of the float32 student head if more.

    Every chunk streams both heads through the caches, so chunks must grow with the hidden size to keep the
    matrix products fast; a workspace in proportion to the head does that.
    """
    return max(256 * _MIB, head_bytes // 2) if device_type == "cpu" else 1024 * _MIB


def plan_chunks(
    n_tokens: int,
    workspace_bytes: int,
    *,
    fixed_bytes: int,
    row_bytes: int,
    block_row_bytes: int,
    block_rows: int,
) -> ChunkPlan:
    """The largest chunks with fixed + rows * row_bytes + block_rows * block_row_bytes within the bound.

    Args:
        n_tokens: tokens to be covered.
        workspace_bytes: the bound.
        fixed_bytes: temporary memory whatever the chunk.
        row_bytes: temporary memory per row of a chunk.
        block_row_bytes: temporary memory per row of a block of row arithmetic.
        block_rows: rows that a block should have; fewer are taken where the bound asks for it.

    Raises:
        ValueError: not even one row fits.
    """
    least = fixed_bytes + row_bytes + block_row_bytes
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be at least {least} to hold one token's logits, got {workspace_bytes}"
        )
    block = max(1, min(block_rows, n_tokens))
    while block > 1 and fixed_bytes + block * (row_bytes + block_row_bytes) > workspace_bytes:
        block //= 2
    most = (workspace_bytes - fixed_bytes - block * block_row_bytes) // row_bytes
    rows = math.ceil(n_tokens / math.ceil(n_tokens / most)) if n_tokens else 1
    aligned = math.ceil(rows / _ROW_MULTIPLE) * _ROW_MULTIPLE
    return ChunkPlan(n_tokens, aligned if aligned <= most else rows, block)
