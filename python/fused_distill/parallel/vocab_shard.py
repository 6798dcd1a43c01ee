"""Vocabulary parallelism: this rank's shard, and reductions over the ranks that share a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ON_ANOTHER_RANK = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class ShardGroup:
    """Reductions over the ranks that share a vocabulary; without a process group they change nothing.

    All ranks call the same reductions in the same order.
    """

    process_group: ProcessGroup | None = None

    def all_reduce_max(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Return the elementwise maximum over the ranks of each (n, ...) tensor, in one collective."""
        return self._reduce("MAX", columns)

    def all_reduce_sum(self, *columns: Tensor | None) -> tuple[Any, ...]:
        """Return the sum over the ranks of each (n, ...) tensor or None, in one collective.

        The sum of bool tensors is True where any rank has True.
        """
        return self._reduce("SUM", columns)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' (n, ...) tensors as (n, ..., ranks)."""
        if self.process_group is None:
            return tensor.unsqueeze(-1)
        shape = (self.process_group.size(), *tensor.shape)
        gathered = tensor.new_empty(shape)
        if tensor.numel():
            distributed.all_gather(list(gathered.unbind()), tensor, self.process_group)
        return gathered.movedim(0, -1).contiguous()

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.process_group is None:
            return
        dense = tensor.contiguous()
        self._all_reduce(dense, "SUM")
        if dense is not tensor:
            tensor.copy_(dense)

    def _reduce(self, operation: str, columns: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        if self.process_group is None:
            return columns
        present = [c for c in columns if c is not None]
        flat = [(c.unsqueeze(-1) if c.dim() == 1 else c).to(present[0].dtype) for c in present]
        packed = torch.cat(flat, -1)
        self._all_reduce(packed, operation)
        parts = iter(packed.split([c.shape[-1] for c in flat], -1))
        return tuple(
            None if c is None else next(parts).contiguous().reshape(c.shape).to(c.dtype) for c in columns
        )

    def _all_reduce(self, tensor: Tensor, operation: str) -> None:
        if tensor.numel():
            distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation), self.process_group)


@dataclass(frozen=True)
class VocabShard:
    """The columns of the compared vocabulary that this rank holds."""

    total: int  # columns over all ranks
    start: int  # id of the first local column
    size: int  # local columns
    max_local_size: int  # the largest `size` of any rank
    group: ShardGroup = ShardGroup()
    n_surplus: int = 0  # further rows of the student's head that take part in its softmax

    @classmethod
    def from_heads(
        cls,
        process_group: ProcessGroup | None,
        vocab_size: int | None,
        heads: Mapping[str, Tensor],  # (V, D) weights by argument name
        equal_on_all_ranks: Mapping[str, int | Tensor],
    ) -> VocabShard:
        """Return this rank's shard; with a process group, one all-gather compares the ranks' arguments.

        Args:
            process_group: ranks that share the vocabulary; None: this rank holds it all.
            vocab_size: columns that are compared over all ranks; None: as many as every head has.
            heads: LM head weights whose rows are this rank's shard of the vocabulary.
            equal_on_all_ranks: numbers, with their names, that must be the same on every rank.

        Raises:
            ValueError: vocab_size exceeds a head, or the ranks' arguments do not fit each other.
        """
        if process_group is None:
            total = compared_columns(vocab_size, heads)
            return cls(total, 0, total, total)
        numbers = _all_gather(process_group, [*equal_on_all_ranks.values(), *map(len, heads.values())], heads)
        for name, values in zip(equal_on_all_ranks, numbers, strict=False):
            if len(set(values)) > 1:
                raise ValueError(f"{name} must be the same on every rank of process_group, got {values}")
        rows = dict(zip(heads, numbers[len(equal_on_all_ranks) :], strict=True))
        return cls._from_rows(process_group, vocab_size, rows)

    @classmethod
    def _from_rows(
        cls, process_group: ProcessGroup, vocab_size: int | None, rows: dict[str, list[int]]
    ) -> VocabShard:
        """Return this rank's shard, given every head's rows on each rank."""
        smallest = min(map(sum, rows.values()))
        if vocab_size is not None and vocab_size > smallest:
            raise ValueError(
                "vocab_size must not exceed the rows of a head over all ranks, "
                f"got {vocab_size} with {smallest}"
            )
        total = vocab_size or smallest
        (first, bounds), *others = ((name, _bounds(total, held)) for name, held in rows.items())
        for name, other in others:
            if other != bounds:
                raise ValueError(
                    f"{name} must be sharded over process_group at the same rows as {first}, "
                    f"got {other} and {bounds}"
                )
        if not all(start < end for start, end in bounds):
            raise ValueError(
                f"every rank of process_group must hold rows of {first} below vocab_size, got {bounds}"
            )
        start, end = bounds[distributed.get_rank(process_group)]
        largest = max(end - start for start, end in bounds)
        return cls(total, start, end - start, largest, ShardGroup(process_group))

    @property
    def is_sharded(self) -> bool:
        """True if several ranks share the vocabulary."""
        return self.group.process_group is not None

    @property
    def student_size(self) -> int:
        """Columns of the student's logits on this rank."""
        return self.size + self.n_surplus

    @property
    def max_student_size(self) -> int:
        """The largest `student_size` of any rank."""
        return self.max_local_size + self.n_surplus

    def to_local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return local columns of ids (0 for ids of other ranks), and a bool tensor of which are local."""
        column = ids - self.start
        is_local = (column >= 0) & (column < self.size)
        return column.masked_fill(~is_local, 0), is_local

    def local_labels(self, labels: Tensor) -> Tensor:
        """Return local columns of labels: a column beyond all for labels of other ranks, -100 unchanged."""
        if not self.is_sharded:
            return labels
        column, is_local = self.to_local(labels)
        return torch.where(labels < 0, labels, column.masked_fill(~is_local, _ON_ANOTHER_RANK))


def compared_columns(vocab_size: int | None, heads: Mapping[str, Tensor]) -> int:
    """Return vocab_size, or the rows that all heads have; ValueError if vocab_size exceeds a head's rows."""
    smallest = min(map(len, heads.values()))
    if vocab_size is not None and vocab_size > smallest:
        shapes = " and ".join(f"{name} {tuple(weight.shape)}" for name, weight in heads.items())
        raise ValueError(f"vocab_size must not exceed the rows of a head, got {vocab_size} with {shapes}")
    return vocab_size or smallest


def _all_gather(
    process_group: ProcessGroup, values: list[int | Tensor], heads: Mapping[str, Tensor]
) -> list[list[int]]:
    """Return every value as a list with one entry per rank."""
    device = next(iter(heads.values())).device
    local = torch.stack([torch.as_tensor(value, device=device, dtype=torch.int64) for value in values])
    ranks = [torch.empty_like(local) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather(ranks, local, group=process_group)
    return torch.stack(ranks, -1).tolist()


def _bounds(total: int, rows: list[int]) -> list[tuple[int, int]]:
    """Return the first column and the end of each rank's shard, cut off at `total`."""
    ends = [min(end, total) for end in accumulate(rows)]
    return list(zip([0, *ends], ends, strict=False))
