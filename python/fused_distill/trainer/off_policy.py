"""Completions of an older student: probability ratios as weights, and the loss on sampled tokens only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import fused_linear_topk_jsd
from ..huggingface.lm_head import LMHeadParams
from ..stats import DistillStats
from .config import TrainConfig
from .data import Batch


class ImportanceRatios:
    """Ratios p_now / p_then of the sampled tokens by the current student and the one that generated them.

    Both are taken at temperature 1 without top_p and top_k, so that the ratio of unchanged weights is 1, but
    for rounding. Completions from the data have no ratio, and weight 1.
    """

    def __init__(self, config: TrainConfig):
        settings = config.rollouts
        stale = settings.engine != "transformers" and (settings.sync_every > 1 or settings.ahead > 0)
        self.clip, self.enabled = settings.importance_clip, stale or settings.importance_clip is not None
        self._rows: list[Tensor] = []  # of the current step, see `take`

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
        known = then.isfinite()
        own = torch.cat([ratios.where(known, 0.0), ratios.new_zeros(1)])
        self._rows.append(torch.stack([own.sum(), known.sum(), own.max()]))
        return None if self.clip is None else ratios.clamp(max=self.clip).nan_to_num(nan=1.0)

    def take(self) -> Tensor | None:
        """Return sum, number and maximum (3,) of this process's ratios since the last call, if any."""
        if not self._rows:
            return None
        rows, self._rows = torch.stack(self._rows), []
        return torch.cat([rows[:, :2].sum(0), rows[:, 2:].amax(0)])


def rollout_logprobs(batch: Batch) -> Tensor:
    """Return the sampled tokens' log-probabilities (n,) when they were sampled; NaN for the data's tokens."""
    rows = [s.logprobs or [torch.nan] * len(s.completion) for s in batch.samples]
    return torch.tensor([p for row in rows for p in row], device=batch.tokens.device)


def sampled_ids(batch: Batch) -> Tensor:
    """Return the completion tokens (n,) that the valid positions predict."""
    return batch.tokens.flatten()[batch.valid + 1]


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
