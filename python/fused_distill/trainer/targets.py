"""What a teacher gives of a batch, and the loss that it leads to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .. import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from ..huggingface.lm_head import LMHeadParams
from ..stats import DistillStats
from .config import TrainConfig
from .data import Batch


class FullTargets(NamedTuple):
    """The teacher at every token of the vocabulary."""

    hidden: Tensor  # (B, T - 1, Dt)
    head: LMHeadParams


class TopKTargets(NamedTuple):
    """The teacher at k tokens."""

    logprobs: Tensor  # (B, T - 1, k) at the loss's temperature
    ids: Tensor  # (B, T - 1, k)


class Teacher(Protocol):
    """What a step needs of a teacher."""

    vocab_size: int  # columns that its head and the student's have in common

    def targets(self, batch: Batch, student_ids: Tensor | None) -> FullTargets | TopKTargets:
        """The teacher's side of the loss; student_ids (B, T - 1, k) are given for targets "student_topk"."""
        ...


def topk_targets(
    hidden: Tensor,  # (B, T - 1, D)
    head: LMHeadParams,
    batch: Batch,
    config: TrainConfig,
    vocab_size: int,
    ids: Tensor | None = None,  # (B, T - 1, k)
) -> TopKTargets:
    """A model at the given ids; None: at its own teacher.k likeliest."""
    found = topk_logprobs(
        hidden,
        head.weight,
        config.teacher.k if ids is None else 0,
        ids,
        mask=batch.mask,
        temperature=config.temperature,
        vocab_size=vocab_size,
        **head.options(),
    )
    if ids is None or found.actual_logprobs is None:
        return TopKTargets(found.logprobs, found.ids)
    return TopKTargets(found.actual_logprobs, ids)


def distillation_loss(
    hidden: Tensor,  # (B, T - 1, Ds)
    head: LMHeadParams,
    targets: FullTargets | TopKTargets,
    batch: Batch,
    config: TrainConfig,
    vocab_size: int,
    normalizer: float,
) -> tuple[Tensor, DistillStats]:
    """The loss of a batch and its statistics; `normalizer` is the count of tokens that the mean is over."""
    common = head.options("student_") | {
        "mask": batch.mask,
        "beta": config.beta,
        "temperature": config.temperature,
        "vocab_size": vocab_size,
        "normalizer": normalizer,
        "return_stats": True,
    }
    if isinstance(targets, TopKTargets):
        return fused_linear_topk_jsd(hidden, head.weight, *targets, tail=config.teacher.tail, **common)
    common |= targets.head.options("teacher_")
    return fused_linear_jsd(hidden, head.weight, targets.hidden, targets.head.weight, **common)
