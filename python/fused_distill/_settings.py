"""The numbers that define a loss, shared by every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class DistillStats(NamedTuple):
    """Per-token diagnostics in nats, detached, shaped like the tokens; 0 (False) at tokens that do not count.

    They describe the two distributions that the loss compares, temperature included.
    """

    student_entropy: Tensor  # (...) float, -sum p_s log p_s
    teacher_entropy: Tensor  # (...) float, -sum p_t log p_t
    forward_kl: Tensor  # (...) float, KL(teacher || student)
    reverse_kl: Tensor  # (...) float, KL(student || teacher)
    top1_agreement: Tensor  # (...) bool, the models share a most likely token

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> DistillStats:
        """Statistics of no token at all."""
        a, b, c, d = torch.zeros(4, *shape, dtype=dtype, device=device)
        return cls(a, b, c, d, torch.zeros(shape, dtype=torch.bool, device=device))


class RowResult(NamedTuple):
    """What row arithmetic gives besides the logit gradient."""

    loss: Tensor  # (n,) weight * (soft_weight * divergence + hard_weight * cross entropy)
    stats: DistillStats | None  # of shape (n,)
