"""The loss of one teacher's tokens: what it is asked, the loss of the settings, and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import topk_logprobs
from ..huggingface.lm_head import LMHeadParams
from .config import TrainConfig
from .metrics import Timer
from .off_policy import ImportanceRatios, sampled_ids, sampled_loss
from .targets import Part, Scored, Teacher, TopKTargets, distillation_loss, topk_targets


def score(
    part: Part,
    hidden: Tensor,  # (m, Ds) of the part's valid tokens
    head: LMHeadParams,
    teacher: Teacher,
    normalizer: float,
    config: TrainConfig,
    importance: ImportanceRatios,
    timer: Timer,
) -> Scored:
    """Return the summed loss divided by `normalizer`, see `distillation_loss` and `sampled_loss`."""
    batch, own, ids = part.batch, None, None
    if teacher.kind == "sampled":
        ids = sampled_ids(batch)[:, None]
    elif teacher.kind == "student_topk":
        own = topk_targets(hidden, head, config, teacher)
        ids = own.ids
    with timer.measure("teacher_seconds"):
        targets = teacher.targets(batch, ids)
    if teacher.kind == "sampled":
        assert isinstance(targets, TopKTargets)
        logprobs, vocab_size = targets.logprobs[:, 0], teacher.vocab_size
        loss, stats = sampled_loss(hidden, head, batch, logprobs, normalizer, vocab_size, importance)
        return Scored(part, loss, stats, targets)

    def logprobs_now() -> Tensor:
        sampled = sampled_ids(batch)
        now = topk_logprobs(
            hidden.detach(), head.weight, 0, sampled, vocab_size=teacher.vocab_size, **head.options()
        ).actual_logprobs
        assert now is not None
        return now

    weights = importance.weights(batch, logprobs_now)
    loss, stats = distillation_loss(hidden, head, targets, normalizer, config, teacher, weights)
    if isinstance(targets, TopKTargets) and stats.student_mass is None:  # tail "renormalize"
        if own is None and not torch.is_grad_enabled():  # in training it would cost a product more
            own = topk_targets(hidden, head, config, teacher, targets.ids)
        if own is not None:
            absent = targets.logprobs.isneginf()
            stats = stats._replace(student_mass=own.logprobs.exp().masked_fill(absent, 0).sum(-1))
    return Scored(part, loss, stats, targets)
