"""The losses in plain PyTorch: every logit in memory, in the inputs' dtype, differentiated by autograd.

Slow and memory-hungry on purpose. The tests compare every backend with it in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Backend, LossConfig, Reduction, Tail, TopKLossConfig
from .stats import DistillStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# fmt: off
@overload
def linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    mask: Tensor | None = ..., student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    beta: float = ..., temperature: float = ...,
    student_logit_scale: float = ..., teacher_logit_scale: float = ...,
    student_softcap: float | None = ..., teacher_softcap: float | None = ...,
    token_weight: Tensor | None = ..., labels: Tensor | None = ..., hard_weight: float = ...,
    soft_weight: float = ..., vocab_size: int | None = ..., reduction: Reduction = ...,
    normalizer: float | Tensor | None = ..., workspace_bytes: int | None = ..., backend: Backend = ...,
    return_stats: Literal[False] = ..., process_group: ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    mask: Tensor | None = ..., student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    beta: float = ..., temperature: float = ...,
    student_logit_scale: float = ..., teacher_logit_scale: float = ...,
    student_softcap: float | None = ..., teacher_softcap: float | None = ...,
    token_weight: Tensor | None = ..., labels: Tensor | None = ..., hard_weight: float = ...,
    soft_weight: float = ..., vocab_size: int | None = ..., reduction: Reduction = ...,
    normalizer: float | Tensor | None = ..., workspace_bytes: int | None = ..., backend: Backend = ...,
    return_stats: Literal[True], process_group: ProcessGroup | None = ...,
) -> tuple[Tensor, DistillStats]: ...
# fmt: on
def linear_jsd(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...) float
    labels: Tensor | None = None,  # (...) int64 / int32
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_jsd` by definition. Tensors are not checked; workspace_bytes is ignored."""
    del backend
    config = LossConfig(
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        vocab_size=vocab_size,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend="reference",
        return_stats=return_stats,
        process_group=process_group,
    )
    return jsd_by_definition(
        config,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        mask=mask,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        token_weight=token_weight,
        labels=labels,
        normalizer=normalizer,
    )


# fmt: off
@overload
def linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    tail: Tail = ..., mask: Tensor | None = ..., student_bias: Tensor | None = ...,
    beta: float = ..., temperature: float = ..., student_logit_scale: float = ...,
    student_softcap: float | None = ..., token_weight: Tensor | None = ..., labels: Tensor | None = ...,
    hard_weight: float = ..., soft_weight: float = ..., vocab_size: int | None = ...,
    reduction: Reduction = ..., normalizer: float | Tensor | None = ...,
    workspace_bytes: int | None = ..., backend: Backend = ..., return_stats: Literal[False] = ...,
    process_group: ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    tail: Tail = ..., mask: Tensor | None = ..., student_bias: Tensor | None = ...,
    beta: float = ..., temperature: float = ..., student_logit_scale: float = ...,
    student_softcap: float | None = ..., token_weight: Tensor | None = ..., labels: Tensor | None = ...,
    hard_weight: float = ..., soft_weight: float = ..., vocab_size: int | None = ...,
    reduction: Reduction = ..., normalizer: float | Tensor | None = ...,
    workspace_bytes: int | None = ..., backend: Backend = ..., return_stats: Literal[True],
    process_group: ProcessGroup | None = ...,
) -> tuple[Tensor, DistillStats]: ...
# fmt: on
def linear_topk_jsd(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K) float, -inf where absent
    teacher_ids: Tensor,  # (..., K) int64 / int32
    *,
    tail: Tail = "bucket",
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...) float
    labels: Tensor | None = None,  # (...) int64 / int32
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_topk_jsd` by definition. Tensors are not checked; workspace_bytes is ignored."""
    del backend
    config = TopKLossConfig(
        tail=tail,
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        vocab_size=vocab_size,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend="reference",
        return_stats=return_stats,
        process_group=process_group,
    )
    return topk_jsd_by_definition(
        config,
        student_hidden,
        student_weight,
        teacher_logprobs,
        teacher_ids,
        mask=mask,
        student_bias=student_bias,
        token_weight=token_weight,
        labels=labels,
        normalizer=normalizer,
    )


def jsd_by_definition(
    config: LossConfig,
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    mask: Tensor | None,  # (...) bool
    student_bias: Tensor | None,  # (Vs,)
    teacher_bias: Tensor | None,  # (Vt,)
    token_weight: Tensor | None,  # (...)
    labels: Tensor | None,  # (...) int64
    normalizer: float | Tensor | None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_jsd` for checked tensors."""
    mask = _valid_mask(student_hidden, mask)
    vocab_size = config.vocab_size or min(len(student_weight), len(teacher_weight))
    student_scale, teacher_scale = config.student_logit_scale, config.teacher_logit_scale
    y_s = _logits(student_hidden[mask], student_weight, student_bias, student_scale, config.student_softcap)
    y_t = _logits(teacher_hidden[mask], teacher_weight, teacher_bias, teacher_scale, config.teacher_softcap)
    y_s, y_t = y_s[:, :vocab_size], y_t[:, :vocab_size].detach()
    log_s = F.log_softmax(y_s / config.temperature, dim=-1)
    log_t = F.log_softmax(y_t / config.temperature, dim=-1)

    hard_loss = _hard_loss(y_s, labels, config.hard_weight, mask)
    loss = config.soft_weight * _jsd(log_s, log_t, config.beta) + hard_loss
    result = _reduce(loss, token_weight, mask, config.reduction, normalizer)
    return (result, _stats(log_s.detach(), log_t, mask)) if config.return_stats else result


def topk_jsd_by_definition(
    config: TopKLossConfig,
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K), -inf where absent
    teacher_ids: Tensor,  # (..., K) int
    *,
    mask: Tensor | None,  # (...) bool
    student_bias: Tensor | None,  # (Vs,)
    token_weight: Tensor | None,  # (...)
    labels: Tensor | None,  # (...) int64
    normalizer: float | Tensor | None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute `fused_linear_topk_jsd` for checked tensors.

    The teacher's entries of each token are spread over the vocabulary, with -inf where it has none.
    """
    mask = _valid_mask(student_hidden, mask)
    scale, softcap = config.student_logit_scale, config.student_softcap
    y_s = _logits(student_hidden[mask], student_weight, student_bias, scale, softcap)
    y_s = y_s[:, : config.vocab_size]
    log_s = F.log_softmax(y_s / config.temperature, dim=-1)
    log_t = torch.full_like(log_s, -math.inf)
    for k in reversed(
        range(teacher_ids.shape[-1])
    ):  # the first of several entries with one id is written last
        logprobs, ids = teacher_logprobs[mask][:, k], teacher_ids[mask][:, k].long()
        rows = (logprobs != -math.inf).nonzero().squeeze(1)
        log_t[rows, ids[rows]] = logprobs[rows].to(log_t.dtype)
    named = log_t != -math.inf
    inside, tail = log_s.masked_fill(~named, -math.inf), log_s.masked_fill(named, -math.inf)
    student_mass, teacher_mass = inside.detach().exp().sum(-1), log_t.exp().sum(-1)
    # Without a product over the vocabulary nothing is known of the student outside the support.
    support_only = config.projects_support_only
    max_s = (inside if support_only else log_s).amax(-1, keepdim=True)
    agreement = (named & (inside == max_s) & (log_t == log_t.amax(-1, keepdim=True))).any(-1)

    if config.tail == "bucket":
        empty = (tail == -math.inf).all(-1, keepdim=True)
        tail = tail.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
        tail_t = (1 - teacher_mass).clamp_min(1e-7).log().unsqueeze(-1)
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

    hard_loss = _hard_loss(y_s, labels, config.hard_weight, mask)
    loss = config.soft_weight * _jsd(inside, log_t, config.beta) + hard_loss
    result = _reduce(loss, token_weight, mask, config.reduction, normalizer)
    if not config.return_stats:
        return result
    stats = _stats(inside.detach(), log_t, mask)._replace(
        top1_agreement=_scatter(mask, agreement),
        student_mass=None if support_only else _scatter(mask, student_mass),
        teacher_mass=_scatter(mask, teacher_mass),
    )
    return result, stats


def _scatter(mask: Tensor, column: Tensor) -> Tensor:
    """Return values of the valid tokens in the shape of the tokens, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=column.dtype, device=column.device).masked_scatter(mask, column)


def _valid_mask(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask


def _hard_loss(y_s: Tensor, labels: Tensor | None, hard_weight: float, mask: Tensor) -> Tensor | float:
    if labels is None or hard_weight == 0:
        return 0.0
    return hard_weight * F.cross_entropy(y_s, labels[mask].long(), reduction="none")


def _reduce(
    loss: Tensor,
    token_weight: Tensor | None,
    mask: Tensor,
    reduction: Reduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    if token_weight is not None:
        loss = loss * token_weight.detach()[mask]
    if reduction == "none":
        return _scatter(mask, loss)
    count = max(len(loss), 1) if normalizer is None else normalizer
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Return the generalized JSD of https://arxiv.org/abs/2306.13649, with its limits at beta 0 and 1."""
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    pair = torch.stack([log_t + math.log(beta), log_s + math.log1p(-beta)])
    log_m = torch.logsumexp(pair.masked_fill((pair == -math.inf).all(0), 0), 0)  # 0 where both are absent
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) with 0 log 0 = 0."""
    gap = torch.where(log_p.exp() == 0, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def _stats(log_s: Tensor, log_t: Tensor, mask: Tensor) -> DistillStats:
    match_s, match_t = (log == log.amax(-1, keepdim=True) for log in (log_s, log_t))
    columns = (
        _entropy(log_s),
        _entropy(log_t),
        _kl(log_t, log_s),
        _kl(log_s, log_t),
        (match_s & match_t).any(-1),
    )
    return DistillStats(*(_scatter(mask, column) for column in columns))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p.exp() == 0, 0.0, log_p)).sum(-1)
