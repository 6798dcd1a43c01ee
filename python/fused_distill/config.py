"""The numbers that define a loss, shared by every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSettings:
    """What the loss is, apart from tensors. See `fused_linear_jsd` for the meaning of each field."""

    beta: float = 0.5
    temperature: float = 1.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    hard_weight: float = 0.0
    soft_weight: float = 1.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LossSettings:
        """From a public function's keywords; those that are not fields are left out."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    @property
    def needs_two_softmaxes(self) -> bool:
        """Whether the cross entropy is at another temperature than the divergence."""
        return self.hard_weight != 0 and self.temperature != 1

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        """The numbers for compiled row arithmetic, on the CPU, in the order in which `_rows` unbinds them."""
        numbers = [
            self.beta,
            1.0 - self.beta,
            1.0 / self.temperature,
            self.student_logit_scale,
            self.teacher_logit_scale,
            self.student_softcap or 1.0,
            self.teacher_softcap or 1.0,
            self.hard_weight,
            self.soft_weight,
        ]
        return torch.tensor(numbers, dtype=dtype)


class DistillStats(NamedTuple):
    """Per-token diagnostics in nats, detached, shaped like the tokens; 0 (False) at tokens that do not count.

    They describe the two distributions that the loss compares, temperature included. For a top-k teacher
    these are over the K ids, and over the rest as one more outcome with tail="bucket"; with tail="truncate"
    the entropies and divergences are sums over the K ids.
    """

    student_entropy: Tensor  # (...) float, -sum p_s log p_s
    teacher_entropy: Tensor  # (...) float, -sum p_t log p_t
    forward_kl: Tensor  # (...) float, KL(teacher || student)
    reverse_kl: Tensor  # (...) float, KL(student || teacher)
    top1_agreement: Tensor  # (...) bool, a most likely token in common; a top-k teacher's among the K ids
    # Of top-k losses only, the student's where the whole vocabulary is projected:
    student_mass: Tensor | None = None  # (...) float, probability of the K ids
    teacher_mass: Tensor | None = None  # (...) float

    def map(self, function: Callable[[Tensor], Tensor]) -> DistillStats:
        """The function of every field that is there."""
        return DistillStats(*(None if c is None else function(c) for c in self))  # pyright: ignore[reportArgumentType]


class RowResult(NamedTuple):
    """What row arithmetic gives besides the logit gradient."""

    loss: Tensor  # (n,) weight * (soft_weight * divergence + hard_weight * cross entropy)
    stats: DistillStats | None  # of shape (n,)

    @classmethod
    def concatenate(cls, parts: list[RowResult]) -> RowResult:
        """The rows of all parts, of which there is at least one."""
        losses, stats = zip(*parts, strict=True)
        if stats[0] is None:
            return cls(torch.cat(losses), None)
        columns = iter(zip(*([c for c in s if c is not None] for s in stats), strict=True))
        return cls(torch.cat(losses), stats[0].map(lambda _: torch.cat(next(columns))))
