"""Chunk sizes: how many rows of logits exist at once, computed from the bound on temporary memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LossConfig
from ..parallel.vocab_shard import VocabShard
from ..validation import check_no_dtensors

_MIB = 1 << 20
_ROW_MULTIPLE = 64  # matrix products are fast for row counts that fill their tiles


@dataclass(frozen=True)
class Workspace:
    """Temporary bytes that one part of the chunk loop needs. The needs of several parts are added."""

    fixed: int = 0  # independent of the chunk
    per_row: int = 0  # per row of a chunk
    per_block_row: int = 0  # per row of a block, a part of a chunk that is processed at once
    block_rows: int = 0  # rows that a block should have; 0: this part does not use blocks

    def __add__(self, other: Workspace) -> Workspace:
        return Workspace(
            self.fixed + other.fixed,
            self.per_row + other.per_row,
            self.per_block_row + other.per_block_row,
            max(self.block_rows, other.block_rows),
        )


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of `rows` tokens; the row arithmetic inside a chunk runs on blocks of `block_rows` rows."""

    n_tokens: int
    rows: int
    block_rows: int

    def chunks(self) -> Iterator[slice]:
        """Yield the chunks in order; one empty chunk if there is no token."""
        return blocks(self.n_tokens, self.rows)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(n) in order; one empty slice if n is 0."""
    for start in range(0, max(n, 1), size):
        yield slice(start, min(start + size, n))


def default_workspace_bytes(device_type: str, head_bytes: int) -> int:
    """Return the default bound: 1 GiB on a GPU; on a CPU max(256 MiB, half the float32 student head).

    Every chunk streams both heads through the caches, so chunks must grow with the hidden size to keep the
    matrix products fast. A workspace proportional to the head does that.
    """
    return max(256 * _MIB, head_bytes // 2) if device_type == "cpu" else 1024 * _MIB


def plan_chunks(n_tokens: int, workspace_bytes: int, need: Workspace) -> ChunkPlan:
    """Return the largest chunks whose temporary memory stays within workspace_bytes.

    The memory is need.fixed + rows * need.per_row + block_rows * need.per_block_row. Blocks have
    need.block_rows rows, or fewer if the bound requires it.

    Raises:
        ValueError: not even one row fits.
    """
    minimum = need.fixed + need.per_row + need.per_block_row
    if workspace_bytes < minimum:
        raise ValueError(
            f"workspace_bytes must be at least {minimum} to hold one token's logits, got {workspace_bytes}"
        )
    block = max(1, min(need.block_rows, n_tokens))
    while block > 1 and need.fixed + block * (need.per_row + need.per_block_row) > workspace_bytes:
        block //= 2
    max_rows = (workspace_bytes - need.fixed - block * need.per_block_row) // need.per_row
    rows = math.ceil(n_tokens / math.ceil(n_tokens / max_rows)) if n_tokens else 1
    aligned = math.ceil(rows / _ROW_MULTIPLE) * _ROW_MULTIPLE
    return ChunkPlan(n_tokens, aligned if aligned <= max_rows else rows, block)


def shard_of_call(
    config: LossConfig,
    student: Mapping[str, Tensor | None],  # tensors that may need gradients, by argument name
    teacher: Mapping[str, Tensor],  # tensors of the teacher's matrix products, by argument name
    mask: Tensor | None,  # (...) bool
) -> VocabShard:
    """Return this rank's shard of the vocabulary, once all ranks are known to derive the same chunks.

    Ranks reduce each other's partial results chunk by chunk. So everything that a plan depends on must be
    equal on all ranks of config.process_group: the number of valid tokens, workspace_bytes and which
    gradients are needed.

    Raises:
        ValueError: vocab_size is too large, or the ranks' arguments do not fit each other.
        TypeError: a DTensor with a process group.
    """
    equal_on_all_ranks: dict[str, int | Tensor] = {}
    if config.process_group is not None:
        check_no_dtensors({**student, **teacher})
        hidden = student["student_hidden"]
        assert hidden is not None
        equal_on_all_ranks = {
            "the number of valid tokens, by student_hidden and mask,": (
                hidden.shape[:-1].numel() if mask is None else mask.sum()
            ),
            "workspace_bytes": config.workspace_bytes or 0,
        }
        for name, tensor in student.items():
            needs_grad = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            equal_on_all_ranks[f"whether {name} requires a gradient"] = int(needs_grad)
    heads = {k: t for k, t in {**student, **teacher}.items() if k.endswith("_weight") and t is not None}
    return VocabShard.from_heads(config.process_group, config.vocab_size, heads, equal_on_all_ranks)
