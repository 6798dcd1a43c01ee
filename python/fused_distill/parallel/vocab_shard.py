"""The vocabulary of a call: in one piece, or cut into blocks that the ranks of a process group hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..validation import check_vocab_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ELSEWHERE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Vocabulary:
    """The columns that are compared, and which of them are here.

    Every rank calls the same reductions in the same order: what a chunk and a block hold follows from numbers
    that are the same on all ranks, `largest` among them.
    """

    total: int
    start: int  # id of the first column here
    size: int  # columns here
    largest: int  # columns of the rank that has most
    group: ProcessGroup | None

    @classmethod
    def whole(cls, total: int) -> Vocabulary:
        """In one piece."""
        return cls(total, 0, total, total, None)

    @classmethod
    def of(
        cls,
        group: ProcessGroup | None,
        vocab_size: int | None,
        *,
        student_hidden: Tensor,  # (..., D)
        student_weight: Tensor,  # (V, D)
        student_bias: Tensor | None,  # (V,)
        teacher_weight: Tensor | None = None,  # (V, D)
        mask: Tensor | None,  # (...) bool
        workspace_bytes: int | None,
    ) -> Vocabulary:
        """The columns that a call compares. With a group: one all-gather, to see that its ranks agree.

        Raises:
            ValueError: vocab_size is too large, or the ranks' arguments do not fit each other.
            TypeError: a DTensor with a group.
        """
        weights = {"student_weight": student_weight}
        if teacher_weight is not None:
            weights["teacher_weight"] = teacher_weight
        if group is None:
            return cls.whole(check_vocab_size(vocab_size, **weights))
        leaves = {
            "student_hidden": student_hidden,
            "student_weight": student_weight,
            "student_bias": student_bias,
        }
        for name, tensor in {**leaves, **weights}.items():
            if hasattr(tensor, "full_tensor"):
                raise TypeError(
                    f"{name} must be an ordinary tensor with process_group, as to_local() gives of a DTensor"
                )
        alike = {
            "the number of tokens that count, by student_hidden and mask,": student_hidden.shape[:-1].numel(),
            "workspace_bytes": workspace_bytes or 0,
        }
        for name, tensor in leaves.items():
            wanted = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            alike[f"whether {name} requires a gradient"] = int(wanted)
        mine = torch.tensor([*alike.values(), *map(len, weights.values())], device=student_hidden.device)
        if mask is not None:
            mine[0] = mask.sum()
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, mine, group=group)
        numbers = torch.stack(everyone, -1).tolist()
        for what, values in zip(alike, numbers, strict=False):
            if len(set(values)) > 1:
                raise ValueError(f"{what} must be the same on every rank of process_group, got {values}")
        rows = dict(zip(weights, numbers[len(alike) :], strict=True))
        return cls._cut(group, vocab_size, rows)

    @classmethod
    def _cut(cls, group: ProcessGroup, vocab_size: int | None, rows: dict[str, list[int]]) -> Vocabulary:
        """From each head's rows by rank."""
        least = min(map(sum, rows.values()))
        if vocab_size is not None and vocab_size > least:
            raise ValueError(
                f"vocab_size must not exceed the rows of a head over all ranks, got {vocab_size} with {least}"
            )
        total = vocab_size or least
        (first, blocks), *others = ((name, _blocks(total, held)) for name, held in rows.items())
        for name, other in others:
            if other != blocks:
                raise ValueError(
                    f"{name} must be cut over process_group at the rows at which {first} is, "
                    f"got {other} and {blocks}"
                )
        if not all(start < end for start, end in blocks):
            raise ValueError(
                f"every rank of process_group must hold rows of {first} below vocab_size, got {blocks}"
            )
        start, end = blocks[distributed.get_rank(group)]
        return cls(total, start, end - start, max(end - start for start, end in blocks), group)

    def column(self, labels: Tensor) -> Tensor:
        """Columns of labels here, beyond all columns for one elsewhere; -100 as it is."""
        if self.group is None:
            return labels
        column, here = self.place(labels)
        return torch.where(labels < 0, labels, column.masked_fill(~here, _ELSEWHERE))

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ids here, 0 for an id elsewhere; which are here."""
        column = ids - self.start
        here = (column >= 0) & (column < self.size)
        return column.masked_fill(~here, 0), here

    def maximum(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Every rank's largest, in one reduction; (n, ...) each."""
        return self._reduce("MAX", columns)

    def sum(self, *columns: Tensor | None) -> tuple[Any, ...]:
        """The ranks' sum, in one reduction; for booleans whether any is true. (n, ...) each, or None."""
        return self._reduce("SUM", columns)

    def _reduce(self, operation: str, columns: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        if self.group is None:
            return columns
        there = [c for c in columns if c is not None]
        flat = [(c.unsqueeze(-1) if c.dim() == 1 else c).to(there[0].dtype) for c in there]
        packed = torch.cat(flat, -1)
        self._all_reduce(packed, operation)
        parts = iter(packed.split([c.shape[-1] for c in flat], -1))
        return tuple(
            None if c is None else next(parts).contiguous().reshape(c.shape).to(c.dtype) for c in columns
        )

    def add_up(self, tensor: Tensor) -> None:
        """The ranks' sum, in place."""
        if self.group is None:
            return
        dense = tensor.contiguous()
        self._all_reduce(dense, "SUM")
        if dense is not tensor:
            tensor.copy_(dense)

    def _all_reduce(self, tensor: Tensor, operation: str) -> None:
        if tensor.numel():
            distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation), self.group)


def _blocks(total: int, rows: list[int]) -> list[tuple[int, int]]:
    """First column and end of each rank's rows, those from `total` on left out."""
    ends = [min(end, total) for end in accumulate(rows)]
    return list(zip([0, *ends], ends, strict=False))
