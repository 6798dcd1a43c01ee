"""Results of a loss besides its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class DistillStats(NamedTuple):
    """Per-token diagnostics in nats, detached, in the shape of the tokens; 0 (False) at masked tokens.

    They describe the two distributions that the loss compares, temperature included. For a top-k teacher the
    distributions are over the K ids, plus one outcome for the tail with tail="bucket". With tail="truncate"
    entropies and divergences are sums over the K ids.
    """

    student_entropy: Tensor  # (...) float, -sum p_s log p_s
    teacher_entropy: Tensor  # (...) float, -sum p_t log p_t
    forward_kl: Tensor  # (...) float, KL(teacher || student)
    reverse_kl: Tensor  # (...) float, KL(student || teacher)
    top1_agreement: Tensor  # (...) bool, both have the same most likely token
    # Only for top-k losses; student_mass is None where the vocabulary is not projected.
    student_mass: Tensor | None = None  # (...) float, the student's probability of the K ids
    teacher_mass: Tensor | None = None  # (...) float, the teacher's probability of the K ids

    def map(self, function: Callable[[Tensor], Tensor]) -> DistillStats:
        """Apply a function to every field that is not None."""
        return DistillStats(*(None if c is None else function(c) for c in self))  # pyright: ignore[reportArgumentType]


# Returns (n,) token weights for the statistics of n tokens, and for the entries of token_data by keyword.
WeightFunction: TypeAlias = Callable[..., Tensor]


class RowResult(NamedTuple):
    """Losses and statistics of n rows."""

    loss: Tensor  # (n,) weight * (soft_weight * divergence + hard_weight * cross entropy)
    stats: DistillStats | None  # of shape (n,)

    @classmethod
    def concatenate(cls, parts: list[RowResult]) -> RowResult:
        """Join the rows of at least one part."""
        losses, stats = zip(*parts, strict=True)
        if stats[0] is None:
            return cls(torch.cat(losses), None)
        columns = iter(zip(*([c for c in s if c is not None] for s in stats), strict=True))
        return cls(torch.cat(losses), stats[0].map(lambda _: torch.cat(next(columns))))
