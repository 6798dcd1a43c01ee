"""Chunk sizes: how many rows of logits exist at once, computed from the bound on temporary memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..config import LossConfig
from ..parallel.vocab_shard import VocabShard
from ..validation import check_no_dtensors
from .cpu_product import VARIABLE as CPU_PRODUCT
from .gemm import use_onednn

_MIB = 1 << 20
_ROW_MULTIPLE = 64  # on a CPU products are fast for row counts that fill their tiles
# On a GPU, where the logit gradient has a buffer of its own; see docs/memory.md.
_TILE_ROWS = 128  # rows of a matrix product's tile
_MAX_LOGIT_ROWS = 512  # from here on a projection takes longer to compute than to read the head
_GRAD_ROWS_PER_LOGIT_ROW = 4


@dataclass(frozen=True)
class Workspace:
    """Temporary bytes that one part of the chunk loop needs. The needs of several parts are added."""

    fixed: int = 0  # independent of the chunk
    per_row: int = 0  # per row of a chunk
    per_grad_row: int = 0  # per row of the logit gradient, where it has a buffer of its own
    per_block_row: int = 0  # per row of a block, a part of a chunk that is processed at once
    block_rows: int = 0  # rows that a block should have; 0: this part does not use blocks

    def __add__(self, other: Workspace) -> Workspace:
        return Workspace(
            self.fixed + other.fixed,
            self.per_row + other.per_row,
            self.per_grad_row + other.per_grad_row,
            self.per_block_row + other.per_block_row,
            max(self.block_rows, other.block_rows),
        )

    def either(self, other: Workspace) -> Workspace:
        """Return the need of two parts that run one after the other and share their memory."""
        return Workspace(*map(max, astuple(self), astuple(other)))

    @property
    def minimum(self) -> int:
        """Return the bytes for chunks of one token."""
        return self.bytes_for(ChunkPlan(1, 1, 1, 1, 1))

    def bytes_for(self, plan: ChunkPlan) -> int:
        """Return the bytes for a plan's chunks."""
        rows = plan.rows * self.per_row + plan.grad_buffer_rows * self.per_grad_row
        return self.fixed + rows + plan.block_rows * self.per_block_row


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of `rows` tokens, whose logit gradients are multiplied once per `grad_rows` tokens.

    The row arithmetic inside a chunk runs on blocks of `block_rows` rows.
    """

    n_tokens: int
    rows: int
    grad_rows: int  # a multiple of rows, unless all tokens fit
    grad_buffer_rows: int  # what the bound allows: at least grad_rows
    block_rows: int

    def chunks(self, part: slice | None = None) -> Iterator[slice]:
        """Yield the chunks of a part, or of all tokens, in order; one empty chunk if there is no token."""
        first, end = (0, self.n_tokens) if part is None else (part.start, part.stop)
        return (slice(first + c.start, first + c.stop) for c in blocks(end - first, self.rows))

    def grad_chunks(self) -> Iterator[slice]:
        """Yield the tokens of each logit gradient in order; no tokens once if there is none."""
        return blocks(self.n_tokens, self.grad_rows)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(n) in order; one empty slice if n is 0."""
    for start in range(0, max(n, 1), size):
        yield slice(start, min(start + size, n))


def default_workspace_bytes(device_type: str, head_bytes: int, device_memory: int | None = None) -> int:
    """Return the default bound for a student head of head_bytes in float32.

    Every chunk reads both heads and every logit gradient adds to the weight gradient, so that chunks must
    grow with the head to keep the matrix products fast. On a CPU the bound is twice the head, at least 256
    MiB. On a GPU it is the head, as large as the accumulated weight gradient, but from a fortieth to a
    sixteenth of the device's memory, and at least 1 GiB.
    """
    if device_type == "cpu":
        return max(256 * _MIB, 2 * head_bytes)
    if device_memory is not None:
        head_bytes = min(max(head_bytes, device_memory // 40), device_memory // 16)
    return max(1024 * _MIB, head_bytes)


def plan_chunks(
    n_tokens: int, workspace_bytes: int, need: Workspace, *, constant_sizes: bool = False
) -> ChunkPlan:
    """Return the chunks whose temporary memory, need.bytes_for(plan), stays within workspace_bytes.

    Blocks have need.block_rows rows, or fewer if the bound requires it. Logit gradients are as few as the
    bound allows, of about equal size. With constant_sizes, which is for GPUs, the buffers do not depend on
    n_tokens where it exceeds them, so that the allocator reuses its blocks.

    Raises:
        ValueError: not even one row fits.
    """
    if workspace_bytes < need.minimum:
        raise ValueError(
            f"workspace_bytes must be at least {need.minimum} to hold one token's logits, "
            f"got {workspace_bytes}"
        )
    block = max(1, min(need.block_rows, n_tokens))
    while block > 1 and need.bytes_for(ChunkPlan(n_tokens, block, block, block, block)) > workspace_bytes:
        block //= 2
    for_rows = workspace_bytes - need.fixed - block * need.per_block_row
    if constant_sizes:
        rows, grad_rows = (min(r, max(1, n_tokens)) for r in _constant_rows(for_rows, need))
        balanced = math.ceil(n_tokens / math.ceil(max(1, n_tokens) / grad_rows) / rows) * rows
        return ChunkPlan(n_tokens, rows, min(max(rows, balanced), grad_rows), grad_rows, block)
    max_rows = for_rows // (need.per_row + need.per_grad_row)
    rows = math.ceil(n_tokens / math.ceil(n_tokens / max_rows)) if n_tokens else 1
    aligned = math.ceil(rows / _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = aligned if aligned <= max_rows else rows
    return ChunkPlan(n_tokens, rows, rows, rows, block)


def _constant_rows(for_rows: int, need: Workspace) -> tuple[int, int]:
    """Return the rows of logits and of the logit gradient that fit into for_rows bytes.

    A projection reads the head for each chunk, and is bound by arithmetic from about 512 rows on. The weight
    gradient is read and written once per logit gradient, in float32, and gains up to thousands of rows. A
    gradient row is also the smaller one: 2 bytes per token of the vocabulary, against 8 for two models'
    logits. So there are up to 512 rows of logits, as long as four times as many gradient rows fit, and the
    gradient takes the rest.
    """
    if not need.per_grad_row:
        rows = _round_down(for_rows // need.per_row, _TILE_ROWS)
        return rows, rows
    rows = min(_MAX_LOGIT_ROWS, for_rows // (need.per_row + _GRAD_ROWS_PER_LOGIT_ROW * need.per_grad_row))
    if rows < _TILE_ROWS:
        rows = min(_TILE_ROWS, for_rows // (need.per_row + need.per_grad_row))
    rows = _round_down(rows, _TILE_ROWS)
    return rows, _round_down((for_rows - rows * need.per_row) // need.per_grad_row, rows)


def _round_down(n: int, multiple: int) -> int:
    """Return the largest multiple that is at most n, or n if it is below the first."""
    return n - n % multiple if n >= multiple else n


def shard_of_call(
    config: LossConfig,
    student: Mapping[str, Tensor | None],  # tensors that may need gradients, by argument name
    teacher: Mapping[str, Tensor],  # tensors of the teacher's matrix products, by argument name
    mask: Tensor | None,  # (...) bool
    *,
    uses_cpp: bool,
) -> VocabShard:
    """Return this rank's shard of the vocabulary, once all ranks are known to derive the same chunks.

    Ranks reduce each other's partial results chunk by chunk. So everything that a plan depends on must be
    equal on all ranks of config.process_group: the number of valid tokens, workspace_bytes, which gradients
    are needed, whether a C++ compiler was found for the CPU, and the library of the CPU's products.

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
            "whether the rows are computed in C++": int(uses_cpp),
            f"whether oneDNN multiplies, which {CPU_PRODUCT} decides,": int(
                use_onednn(hidden.device, torch.float32)
            ),
        }
        for name, tensor in student.items():
            needs_grad = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            equal_on_all_ranks[f"whether {name} requires a gradient"] = int(needs_grad)
    heads = {k: t for k, t in {**student, **teacher}.items() if k.endswith("_weight") and t is not None}
    return VocabShard.from_heads(config.process_group, config.vocab_size, heads, equal_on_all_ranks)
