"""Completions of an older student: probability ratios as weights, and the loss on sampled tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import fused_linear_topk_jsd, topk_logprobs
from ..huggingface.lm_head import LMHeadParams
from ..stats import DistillStats
from .config import TrainConfig
from .data import Batch
from .targets import Targets, Teacher, TopKTargets, distillation_loss

UNKNOWN_IF_SAMPLED = ("forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")


class ImportanceRatios:
    """Ratios p_now / p_then of the sampled tokens by the current student and the one that generated them.

    Both are taken at temperature 1 without top_p and top_k, so that the ratio of unchanged weights is 1, but
    for rounding. Completions from the data have no ratio, and weight 1.
    """

    def __init__(self, config: TrainConfig):
        settings = config.rollouts
        stale = settings.engine != "transformers" and (settings.sync_every > 1 or settings.ahead > 0)
        self.clip, self.enabled = settings.importance_clip, stale or settings.importance_clip is not None
        self._ratios: list[Tensor] = []  # of the current step

    def weights(self, batch: Batch, logprobs_now: Callable[[], Tensor]) -> Tensor | None:
        """Return the weights (n,) of a batch's tokens, or None if all are 1; evaluations are not weighted.

        Args:
            batch: with n valid tokens.
            logprobs_now: computes log-probabilities (n,) by the current student, if they are needed.
        """
        if not self.enabled or not torch.is_grad_enabled():
            return None
        then = rollout_logprobs(batch)
        ratios = (logprobs_now() - then).exp()
        self._ratios.append(ratios[then.isfinite()])
        return None if self.clip is None else ratios.clamp(max=self.clip).nan_to_num(nan=1.0)

    def read(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Return mean and maximum over all processes since the last call; all of them call it together."""
        if not self.enabled:
            return {}
        ratios = torch.cat([*self._ratios, torch.zeros(0, device=accelerator.device)])
        self._ratios = []
        largest = torch.cat([ratios, ratios.new_zeros(1)]).max()
        local = torch.stack([ratios.sum(), ratios.new_tensor(len(ratios)), largest])
        rows: Any = accelerator.gather(local[None])
        return {"ratio_mean": rows[:, 0].sum() / rows[:, 1].sum().clamp(min=1), "ratio_max": rows[:, 2].max()}


def rollout_logprobs(batch: Batch) -> Tensor:
    """Return the sampled tokens' log-probabilities (n,) when they were sampled; NaN for the data's tokens."""
    rows = [s.logprobs or [torch.nan] * len(s.completion) for s in batch.samples]
    return torch.tensor([p for row in rows for p in row], device=batch.tokens.device)


def sampled_ids(batch: Batch) -> Tensor:
    """Return the completion tokens (n,) that the valid positions predict."""
    return batch.tokens.flatten()[batch.valid + 1]


def batch_loss(
    hidden: Tensor,  # (n, Ds)
    head: LMHeadParams,
    batch: Batch,
    targets: Targets,
    normalizer: float,
    config: TrainConfig,
    teacher: Teacher,
    importance: ImportanceRatios,
) -> tuple[Tensor, DistillStats]:
    """Return the loss of the settings' objective, see `distillation_loss` and `sampled_loss`."""
    vocab_size = teacher.vocab_size
    if config.objective == "sampled":
        assert isinstance(targets, TopKTargets)
        return sampled_loss(hidden, head, batch, targets.logprobs[:, 0], normalizer, vocab_size, importance)

    def logprobs_now() -> Tensor:
        ids = sampled_ids(batch)
        now = topk_logprobs(
            hidden.detach(), head.weight, 0, ids, vocab_size=vocab_size, **head.options()
        ).actual_logprobs
        assert now is not None
        return now

    weights = importance.weights(batch, logprobs_now)
    return distillation_loss(hidden, head, targets, normalizer, config, teacher, weights)


def sampled_loss(
    hidden: Tensor,  # (n, Ds)
    head: LMHeadParams,
    batch: Batch,
    teacher_logprobs: Tensor,  # (n,) of the sampled tokens
    normalizer: float,
    vocab_size: int,
    importance: ImportanceRatios,
) -> tuple[Tensor, DistillStats]:
    """Return the policy gradient's loss on sampled tokens (Thinking Machines, On-Policy Distillation, 2025).

    The gradient is that of -w A log p_s with the constant advantage A = log p_t - log p_s and the importance
    weight w. The value is the mean of -w A, which estimates the reverse KL divergence.
    """
    ids = sampled_ids(batch)[:, None]
    certain = torch.zeros(ids.shape, device=ids.device)
    # Forward KL from a teacher that is sure of the token is -log p_s. Logits are recomputed for the gradient.
    surprisal = fused_linear_topk_jsd(
        hidden,
        head.weight,
        certain,
        ids,
        tail="truncate",
        beta=0.0,
        reduction="none",
        vocab_size=vocab_size,
        **head.options("student_"),
    )
    negative_advantage = -(surprisal.detach() + teacher_logprobs)
    weights = importance.weights(batch, lambda: -surprisal.detach())
    signal = negative_advantage if weights is None else weights * negative_advantage
    gradient = -(signal * surprisal).sum() / normalizer
    loss = gradient + (signal.sum() / normalizer - gradient).detach()
    unknown = torch.zeros_like(negative_advantage)
    return loss, DistillStats(unknown, unknown, unknown, negative_advantage, unknown)
