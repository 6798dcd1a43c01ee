"""What a teacher gives of a batch, and the loss that it leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .. import fused_linear_jsd, fused_linear_topk_jsd
from ..output_heads import OutputHead
from .config import TrainConfig
from .data import Batch

StudentIds = Callable[[], Tensor]  # (B, T - 1, k) the student's likeliest tokens, computed when asked for


class FullTargets(NamedTuple):
    """The teacher at every token of the vocabulary."""

    hidden: Tensor  # (B, T - 1, Dt)
    head: OutputHead


class TopKTargets(NamedTuple):
    """The teacher at k tokens."""

    logprobs: Tensor  # (B, T - 1, k) at the loss's temperature
    ids: Tensor  # (B, T - 1, k)


class Teacher(Protocol):
    """What a step needs of a teacher."""

    def targets(self, batch: Batch, student_ids: StudentIds) -> FullTargets | TopKTargets:
        """The teacher's side of the loss; student_ids is called for targets "student_topk" only."""
        ...


def distillation_loss(
    hidden: Tensor,  # (B, T - 1, Ds)
    head: OutputHead,
    targets: FullTargets | TopKTargets,
    mask: Tensor,  # (B, T - 1) bool
    config: TrainConfig,
    normalizer: float | Tensor,
) -> Any:
    """(loss, DistillStats) of a batch; `normalizer` is the count of tokens that the mean is over."""
    common: dict[str, Any] = {
        "mask": mask,
        "student_bias": head.bias,
        "student_logit_scale": head.logit_scale,
        "student_softcap": head.softcap,
        "beta": config.beta,
        "temperature": config.temperature,
        "normalizer": normalizer,
        "return_stats": True,
    }
    if isinstance(targets, TopKTargets):
        tail = config.teacher.tail
        return fused_linear_topk_jsd(hidden, head.weight, targets.logprobs, targets.ids, tail=tail, **common)
    teacher = targets.head
    return fused_linear_jsd(
        hidden,
        head.weight,
        targets.hidden,
        teacher.weight,
        teacher_bias=teacher.bias,
        teacher_logit_scale=teacher.logit_scale,
        teacher_softcap=teacher.softcap,
        **common,
    )
