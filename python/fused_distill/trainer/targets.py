"""The teacher's side of the loss, the loss itself, and what to report if it is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from ..huggingface.lm_head import LMHeadParams
from ..stats import DistillStats
from .config import TeacherConfig, TrainConfig
from .data import Batch, Sample


class FullTargets(NamedTuple):
    """Full-vocabulary targets (hidden states + LM head)."""

    hidden: Tensor  # (n, Dt)
    head: LMHeadParams


class TopKTargets(NamedTuple):
    """Log-probabilities of the teacher at k tokens per position."""

    logprobs: Tensor  # (n, k) at the loss's temperature
    ids: Tensor  # (n, k)


Targets: TypeAlias = FullTargets | TopKTargets
# sampled: at the sampled tokens. exact: full, in evaluations of a run that trains on one of the other kinds.
Kind: TypeAlias = Literal["full", "topk", "student_topk", "sampled", "exact"]
_Loss: TypeAlias = Callable[..., tuple[Tensor, DistillStats]]


class Teacher(Protocol):
    """Teacher interface used by the training step."""

    settings: TeacherConfig
    kind: Kind  # of its targets
    vocab_size: int  # rows that the LM heads of teacher and student have in common
    fingerprint: str | None  # of its weights; None: its server does not tell it

    def targets(self, batch: Batch, student_ids: Tensor | None) -> Targets:
        """Return the targets of a batch's n valid tokens, at `student_ids` (n, k) if they are given.

        The batch has the teacher's own prompts, see `Batch.for_teacher`.
        """
        ...


class Part(NamedTuple):
    """The tokens of a batch that one teacher scores."""

    name: str  # of the teacher
    samples: list[Sample]
    rows: Tensor | None  # (m,) int64, positions among the batch's n valid tokens; None: all of them
    batch: Batch  # what the teacher sees

    @classmethod
    def split(cls, batch: Batch) -> list[Part]:
        """Return the parts of a batch, one per teacher."""
        names = [sample.teacher for sample in batch.samples]
        if len({*names}) == 1:
            return [cls(names[0], batch.samples, None, batch.for_teacher())]
        device, parts = batch.valid.device, list[Part]()
        for name in sorted({*names}):
            samples = [sample for sample in batch.samples if sample.teacher == name]
            chosen = [name == other for other, n in zip(names, batch.lengths, strict=True) for _ in range(n)]
            rows = torch.tensor(chosen).nonzero().squeeze(1).to(device)
            parts.append(cls(name, samples, rows, Batch.collate(samples, device).for_teacher()))
        return parts

    def select(self, values: Tensor) -> Tensor:
        """Return the part's values (m, ...) of those of all valid tokens (n, ...)."""
        return values if self.rows is None else values.index_select(0, self.rows)


class Scored(NamedTuple):
    """A part with its loss."""

    part: Part
    loss: Tensor  # ()
    stats: DistillStats  # (m,)
    targets: Targets


def topk_targets(
    hidden: Tensor,  # (n, D)
    head: LMHeadParams,
    config: TrainConfig,
    teacher: Teacher,
    ids: Tensor | None = None,  # (n, k)
) -> TopKTargets:
    """Return a model's log-probabilities at `ids`, or at its own k most likely tokens."""
    options: dict[str, Any] = {"temperature": config.temperature, "vocab_size": teacher.vocab_size}
    k = teacher.settings.k if ids is None else 0
    top = topk_logprobs(hidden, head.weight, k, ids, **options, **head.options())
    if ids is None or top.actual_logprobs is None:
        return TopKTargets(top.logprobs, top.ids)
    return TopKTargets(top.actual_logprobs, ids)


def distillation_loss(
    hidden: Tensor,  # (n, Ds)
    head: LMHeadParams,
    targets: Targets,
    normalizer: float,
    config: TrainConfig,
    teacher: Teacher,
    token_weight: Tensor | None = None,  # (n,)
) -> tuple[Tensor, DistillStats]:
    """Return the loss, a sum over tokens divided by `normalizer`, and per-token statistics."""
    if config.objective == "sampled":  # which estimates the reverse KL
        without_effect = ("divergence", "alpha", "reverse_weight", "entry_clip", "surplus", "token_weight")
        defaults = {name: TrainConfig.model_fields[name].default for name in without_effect}
        config = config.model_copy(update=defaults | {"beta": 1.0})
    options: dict[str, Any] = {"normalizer": normalizer, "vocab_size": teacher.vocab_size}
    options |= config.loss_options | {"reverse_weight": config.reverse_weight} | head.options("student_")
    if isinstance(targets, TopKTargets):
        loss = partial(fused_linear_topk_jsd, hidden, head.weight, *targets, tail=teacher.settings.tail)
    else:
        options |= targets.head.options("teacher_")
        loss = partial(fused_linear_jsd, hidden, head.weight, targets.hidden, targets.head.weight)
    compute = cast("_Loss", partial(loss, return_stats=True, **options))
    return compute(**_token_weight(compute, config, token_weight))


def _token_weight(compute: _Loss, config: TrainConfig, factor: Tensor | None) -> dict[str, Any]:
    """Return the arguments that weigh the tokens of the loss that `compute` computes without them."""
    rule = config.token_weight
    if rule is None:
        return {"token_weight": factor}
    if rule.entropy_below is not None:
        limit = rule.entropy_below

        def weigh(stats: DistillStats, factor: Tensor | float = 1.0) -> Tensor:
            return factor * (stats.teacher_entropy < limit)

        return {"token_weight": weigh, "token_data": None if factor is None else {"factor": factor}}
    assert rule.top_fraction is not None
    with torch.no_grad():  # the losses' chunks do not see all tokens at once
        entropy = compute()[1].student_entropy
    k = math.ceil(rule.top_fraction * len(entropy))
    weight = torch.zeros_like(entropy).index_fill_(0, entropy.topk(k).indices, 1.0)
    return {"token_weight": weight if factor is None else weight * factor}


def describe_non_finite(scored: Scored, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describe which tokens have no finite loss and whether the teacher is the cause; None if all do."""
    stats, targets = scored.stats, scored.targets
    bad = ~(stats.forward_kl.isfinite() & stats.reverse_kl.isfinite())
    if not bad.any():
        return None
    teacher = targets.hidden if isinstance(targets, FullTargets) else targets.logprobs
    broken_head = isinstance(targets, FullTargets) and bool(targets.head.weight.isnan().any())
    lines = [f"the loss is not finite at {int(bad.sum())} of {len(bad)} tokens"]
    tokens = [(sample, i) for sample in scored.part.samples for i in range(len(sample.completion))]
    for n in bad.nonzero().flatten().tolist()[:5]:
        sample, i = tokens[n]
        text = tokenizer.decode([sample.completion[i]])
        broken = broken_head or teacher[n].isnan().any()
        token = f"row {sample.row} of the data, token {len(sample.prompt) + i} ({text!r})"
        lines.append(f"{token}: the teacher's numbers are NaN" if broken else token)
    if not broken_head and not teacher[bad].isnan().any():
        lines.append("the teacher's numbers are sound. If the loss grew before, set a lower learning_rate")
    return "; ".join(lines)
