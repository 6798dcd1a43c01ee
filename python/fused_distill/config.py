"""The numbers that define a loss, shared by every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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
