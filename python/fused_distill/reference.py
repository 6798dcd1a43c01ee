"""The losses in plain PyTorch: every logit in memory, in the inputs' dtype, differentiated by autograd.

Simple instead of fast or frugal. The tests compare every backend with it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import JSDKeywords, TopKJSDKeywords, tensors_from
from .chunked.teacher import FullTeacher, TopKTeacher
from .chunked.tensors import LossTensors
from .config import (
    Backend,
    Divergence,
    DivergenceForm,
    LossConfig,
    Reduction,
    Surplus,
    Tail,
    TopKLossConfig,
    config_from,
)
from .rows.base import MIN_TEACHER_TAIL_PROB
from .stats import DistillStats, WeightFunction
from .tracing import check_has_data, untraced
from .validation import FORBIDDEN_LOGPROB, check_probabilities

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


# fmt: off
@overload
def linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_stats: Literal[False] = ..., **options: Unpack[JSDKeywords],
) -> Tensor: ...
@overload
def linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_stats: Literal[True], **options: Unpack[JSDKeywords],
) -> tuple[Tensor, DistillStats]: ...
# fmt: on
@untraced
def linear_jsd(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    divergence: Divergence = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float | Tensor = 0.5,  # or (...)
    entry_clip: float | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | WeightFunction | None = None,  # (...)
    token_data: Mapping[str, Tensor] | None = None,  # (...) each
    labels: Tensor | None = None,  # (...) int64
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    surplus: Surplus = "ignore",
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_jsd` by definition, with the same arguments and results.

    Tensors are not checked. backend and workspace_bytes have no effect, and process_group must be None.
    """
    arguments = {**locals(), "backend": "reference"}
    return loss_by_definition(tensors_from(FullTeacher, arguments), config_from(LossConfig, arguments))


# fmt: off
@overload
def linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    return_stats: Literal[False] = ..., **options: Unpack[TopKJSDKeywords],
) -> Tensor: ...
@overload
def linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    return_stats: Literal[True], **options: Unpack[TopKJSDKeywords],
) -> tuple[Tensor, DistillStats]: ...
# fmt: on
@untraced
def linear_topk_jsd(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K), -inf where absent
    teacher_ids: Tensor,  # (..., K) int
    *,
    tail: Tail = "bucket",
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    divergence: Divergence = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float | Tensor = 0.5,  # or (...)
    entry_clip: float | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_weight: Tensor | WeightFunction | None = None,  # (...)
    token_data: Mapping[str, Tensor] | None = None,  # (...) each
    labels: Tensor | None = None,  # (...) int64
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    surplus: Surplus = "ignore",
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_topk_jsd` by definition; see `linear_jsd`."""
    arguments = {**locals(), "backend": "reference"}
    return loss_by_definition(tensors_from(TopKTeacher, arguments), config_from(TopKLossConfig, arguments))


def loss_by_definition(tensors: LossTensors, config: LossConfig) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute either loss by definition, for checked tensors."""
    mask, student_hidden = tensors.mask, tensors.student_hidden
    check_has_data("student_hidden", student_hidden, mask)
    if torch.compiler.is_exporting():
        raise ValueError('backend must not be "reference" under torch.export, which cannot trace it')
    if mask is None:
        mask = torch.ones(student_hidden.shape[:-1], dtype=torch.bool, device=student_hidden.device)
    y_s = _logits(student_hidden[mask], tensors.student_weight, tensors.student_bias, "student_", config)
    teacher, valid = tensors.teacher, mask.reshape(-1)
    if isinstance(teacher, FullTeacher):
        hidden = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])[valid]
        y_t = _logits(hidden, teacher.weight, teacher.bias, "teacher_", config).detach()
        vocab_size = config.vocab_size or min(y_s.shape[1], y_t.shape[1])
        y_s = y_s if config.surplus == "count" else y_s[:, :vocab_size]
        log_s = F.log_softmax(y_s / config.temperature, dim=-1)
        log_t = F.log_softmax(y_t[:, :vocab_size] / config.temperature, dim=-1)
        top_s, top_t = (log == log.amax(-1, keepdim=True) for log in (log_s, log_t))
        agreement = (top_s[:, :vocab_size] & top_t).any(-1)
        log_s, log_t, log_q = _with_surplus(log_s, log_t)
        stats = _stats(log_s.detach(), log_t, log_q)._replace(top1_agreement=agreement)
    else:
        assert isinstance(teacher, TopKTeacher)
        assert isinstance(config, TopKLossConfig)
        y_s = y_s if config.surplus == "count" else y_s[:, : config.vocab_size]
        log_s = F.log_softmax(y_s / config.temperature, dim=-1)
        logprobs, ids = (t.reshape(-1, teacher.k)[valid] for t in (teacher.logprobs, teacher.ids))
        log_s, log_t, stats = _topk_outcomes(log_s, logprobs, ids, config)
        log_q = log_t

    reverse_weight = tensors.reverse_weight
    if isinstance(reverse_weight, Tensor):
        reverse_weight = reverse_weight.detach().expand(mask.shape)[mask].unsqueeze(-1)
    terms = _terms(log_s, log_t, log_q, reverse_weight, config)
    if config.entry_clip is not None:
        clipped = terms > config.entry_clip
        # An infinite term would have the gradient NaN.
        log_s, log_t, log_q = (log_p.masked_fill(clipped, 0) for log_p in (log_s, log_t, log_q))
        terms = _terms(log_s, log_t, log_q, reverse_weight, config)
        terms = torch.where(clipped, config.entry_clip, terms)
    loss = config.soft_weight * terms.sum(-1)
    if tensors.labels is not None and config.hard_weight != 0:
        labels = tensors.labels[mask].long()
        loss = loss + config.hard_weight * F.cross_entropy(y_s, labels, reduction="none")
    if isinstance(tensors.token_weight, Tensor):
        loss = loss * tensors.token_weight.detach()[mask]
    elif tensors.token_weight is not None and len(loss):
        with torch.no_grad():
            data = {name: tensor[mask] for name, tensor in (tensors.token_data or {}).items()}
            weight = tensors.token_weight(stats, **data)
        loss = loss * weight
    if config.reduction == "none":
        result = _scatter(mask, loss)
    elif config.reduction == "mean" and len(loss):
        result = loss.sum() / (len(loss) if tensors.normalizer is None else tensors.normalizer)
    else:
        result = loss.sum()
    return (result, stats.map(lambda c: _scatter(mask, c))) if config.return_stats else result


def _with_surplus(
    log_s: Tensor,  # (n, Vs)
    log_t: Tensor,  # (n, V)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both models' log-probabilities of V tokens and of the student's other rows together, (n, V + 1).

    The teacher has no probability there. The third result is what reverse KL takes for it: 1e-7 there,
    normalized, where the student has any probability. Without other rows there is no such outcome.
    """
    n_surplus = log_s.shape[1] - log_t.shape[1]
    if not n_surplus:
        return log_s, log_t, log_t
    inside, surplus = log_s.split([log_t.shape[1], n_surplus], -1)
    surplus = _log_sum(surplus)
    floor = torch.full_like(surplus, math.log(MIN_TEACHER_TAIL_PROB), requires_grad=False)
    floor = floor.masked_fill(surplus == -math.inf, -math.inf)
    log_q = F.log_softmax(torch.cat([log_t, floor], -1), dim=-1)
    return torch.cat([inside, surplus], -1), F.pad(log_t, (0, 1), value=-math.inf), log_q


def _log_sum(log_p: Tensor) -> Tensor:
    """Return the (n, 1) logarithm of the sum of probabilities, with zero gradient where all are 0."""
    empty = (log_p == -math.inf).all(-1, keepdim=True)
    return log_p.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)


def _topk_outcomes(
    log_s: Tensor,  # (n, V)
    logprobs: Tensor,  # (n, K)
    ids: Tensor,  # (n, K)
    config: TopKLossConfig,
) -> tuple[Tensor, Tensor, DistillStats]:
    """Return both models' log-probabilities of the outcomes that the tail option compares, and statistics.

    The teacher's entries of each token are spread over the vocabulary, with -inf where it has none.
    """
    log_t = torch.full_like(log_s, -math.inf, requires_grad=False)
    for k in reversed(range(ids.shape[-1])):  # the first of several entries with one id is written last
        rows = (~(logprobs[:, k] <= FORBIDDEN_LOGPROB)).nonzero().squeeze(1)
        log_t[rows, ids[rows, k].long()] = logprobs[rows, k].to(log_t.dtype)
    check_probabilities(log_t, logprobs.dtype)
    named = log_t != -math.inf
    inside, tail = log_s.masked_fill(~named, -math.inf), log_s.masked_fill(named, -math.inf)
    student_mass, teacher_mass = inside.detach().exp().sum(-1), log_t.exp().sum(-1)
    # Without a product over the vocabulary nothing is known of the student outside the support.
    support_only = config.projects_support_only
    max_s = (inside if support_only else log_s).amax(-1, keepdim=True)
    agreement = (named & (inside == max_s) & (log_t == log_t.amax(-1, keepdim=True))).any(-1)

    if config.tail == "bucket":
        tail = _log_sum(tail)
        tail_t = (1 - teacher_mass).clamp_min(MIN_TEACHER_TAIL_PROB).log().unsqueeze(-1)
        tail_t = tail_t.masked_fill(tail == -math.inf, -math.inf)
        inside = torch.cat([inside, tail], -1)
        log_t = F.log_softmax(torch.cat([log_t, tail_t], -1), dim=-1)
    elif config.tail == "renormalize":
        # A token without entries, or whose entries the student forbids, has one outcome for both models.
        without = (inside == -math.inf).all(-1, keepdim=True)
        only_outcome = F.pad(without, (0, named.shape[-1] - 1))
        log_t = log_t.masked_fill(without, -math.inf)
        inside = F.log_softmax(inside.masked_fill(only_outcome, 0), dim=-1)
        log_t = F.log_softmax(log_t.masked_fill(only_outcome, 0), dim=-1)
    stats = _stats(inside.detach(), log_t, log_t)._replace(
        top1_agreement=agreement,
        student_mass=None if support_only else student_mass,
        teacher_mass=teacher_mass,
    )
    return inside, log_t, stats


def _scatter(mask: Tensor, column: Tensor) -> Tensor:
    """Return values of the valid tokens in the shape of the tokens, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=column.dtype, device=column.device).masked_scatter(mask, column)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str, config: LossConfig) -> Tensor:
    scale, softcap = (getattr(config, f"{prefix}{name}") for name in ("logit_scale", "softcap"))
    logits = scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _terms(
    log_s: Tensor, log_t: Tensor, log_q: Tensor, reverse_weight: float | Tensor, config: LossConfig
) -> Tensor:
    """Return each outcome's term of the divergence, with its limits where m is one of the two models.

    log_q is log_t without zeros, for the limit of reverse KL, which they would make infinite.
    """
    form, (of_teacher, of_student, teacher_share, student_share) = config.form, config.mixture
    if form is DivergenceForm.TOTAL_VARIATION:
        return 0.5 * (log_t.exp() - log_s.exp()).abs()
    if form is DivergenceForm.MIXED_KL:
        weight = torch.as_tensor(reverse_weight, dtype=log_s.dtype, device=log_s.device)
        # A weight of 0 drops an infinite divergence, and its gradient.
        forward, reverse = (
            [log_p.masked_fill(factor == 0, 0) for log_p in pair]
            for factor, pair in ((1 - weight, (log_t, log_s)), (weight, (log_s, log_q)))
        )
        return (1 - weight) * _kl_terms(*forward) + weight * _kl_terms(*reverse)
    if form is DivergenceForm.FORWARD_KL:
        return _kl_terms(log_t, log_s)
    if form is DivergenceForm.REVERSE_KL:
        return _kl_terms(log_s, log_q)
    pair = torch.stack([log_t + math.log(teacher_share), log_s + math.log(student_share)])
    log_m = torch.logsumexp(pair.masked_fill((pair == -math.inf).all(0), 0), 0)  # 0 where both are absent
    terms = torch.zeros_like(log_s)
    if of_teacher:
        terms = terms + of_teacher * _kl_terms(log_t, log_m)
    if of_student:
        terms = terms + of_student * _kl_terms(log_s, log_m)
    return terms


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the terms of KL(p || q) with 0 log 0 = 0."""
    gap = torch.where(log_p.exp() == 0, 0.0, log_p - log_q)
    return log_p.exp() * gap


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl_terms(log_p, log_q).sum(-1)


def _stats(log_s: Tensor, log_t: Tensor, log_q: Tensor) -> DistillStats:
    no_agreement = torch.zeros(len(log_s), dtype=torch.bool, device=log_s.device)
    entropies_and_kls = _entropy(log_s), _entropy(log_t), _kl(log_t, log_s), _kl(log_s, log_q)
    return DistillStats(*entropies_and_kls, no_agreement)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p.exp() == 0, 0.0, log_p)).sum(-1)
