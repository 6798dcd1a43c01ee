"""The losses in plain PyTorch: every logit materialised, in the inputs' dtype, differentiated by autograd.

Slow and large on purpose. The tests compare every backend with it in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .stats import DistillStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    token_weight: Tensor | None = None,  # (...)
    labels: Tensor | None = None,  # (...) int64
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """`fused_linear_jsd` by definition, unchecked; workspace_bytes and backend do nothing here."""
    del workspace_bytes, backend
    _refuse(process_group)
    counted = _counted(student_hidden, mask)
    vocab_size = vocab_size or min(len(student_weight), len(teacher_weight))
    y_s = _logits(student_hidden[counted], student_weight, student_bias, student_logit_scale, student_softcap)
    y_t = _logits(teacher_hidden[counted], teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    y_s, y_t = y_s[:, :vocab_size], y_t[:, :vocab_size].detach()
    log_s, log_t = F.log_softmax(y_s / temperature, dim=-1), F.log_softmax(y_t / temperature, dim=-1)

    loss = soft_weight * _jsd(log_s, log_t, beta) + _hard_loss(y_s, labels, hard_weight, counted)
    result = _reduce(loss, token_weight, counted, reduction, normalizer)
    return (result, _stats(log_s.detach(), log_t, counted)) if return_stats else result


def linear_topk_jsd(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K), -inf where absent
    teacher_ids: Tensor,  # (..., K) int
    *,
    tail: str = "bucket",
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...)
    labels: Tensor | None = None,  # (...) int64
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "reference",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """`fused_linear_topk_jsd` by definition, unchecked; workspace_bytes and backend do nothing here.

    Every token's teacher is spread over the vocabulary, -inf where it has no entry.
    """
    del workspace_bytes, backend
    _refuse(process_group)
    counted = _counted(student_hidden, mask)
    y_s = _logits(student_hidden[counted], student_weight, student_bias, student_logit_scale, student_softcap)
    y_s = y_s[:, :vocab_size]
    log_s = F.log_softmax(y_s / temperature, dim=-1)
    log_t = torch.full_like(log_s, -math.inf)
    for k in reversed(range(teacher_ids.shape[-1])):  # of several entries with one id the first counts
        logprobs, ids = teacher_logprobs[counted][:, k], teacher_ids[counted][:, k].long()
        rows = (logprobs != -math.inf).nonzero().squeeze(1)
        log_t[rows, ids[rows]] = logprobs[rows].to(log_t.dtype)
    named = log_t != -math.inf
    inside, rest = log_s.masked_fill(~named, -math.inf), log_s.masked_fill(named, -math.inf)
    student_mass, teacher_mass = inside.detach().exp().sum(-1), log_t.exp().sum(-1)
    # Without a product over the vocabulary nothing is known of the student outside the support.
    gathered = tail == "renormalize" and hard_weight == 0
    top_s = (inside if gathered else log_s).amax(-1, keepdim=True)
    agreement = (named & (inside == top_s) & (log_t == log_t.amax(-1, keepdim=True))).any(-1)

    if tail == "bucket":
        empty = (rest == -math.inf).all(-1, keepdim=True)
        rest = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
        rest_t = (
            (1 - teacher_mass).clamp_min(1e-7).log().unsqueeze(-1).masked_fill(rest == -math.inf, -math.inf)
        )
        inside = torch.cat([inside, rest], -1)
        log_t = F.log_softmax(torch.cat([log_t, rest_t], -1), dim=-1)
    elif tail == "renormalize":
        # A token without entries, or whose entries the student forbids, has one outcome for both models.
        without = (inside == -math.inf).all(-1, keepdim=True)
        alone = F.pad(without, (0, named.shape[-1] - 1))
        log_t = log_t.masked_fill(without, -math.inf)
        inside = F.log_softmax(inside.masked_fill(alone, 0), dim=-1)
        log_t = F.log_softmax(log_t.masked_fill(alone, 0), dim=-1)

    loss = soft_weight * _jsd(inside, log_t, beta) + _hard_loss(y_s, labels, hard_weight, counted)
    result = _reduce(loss, token_weight, counted, reduction, normalizer)
    if not return_stats:
        return result
    stats = _stats(inside.detach(), log_t, counted)._replace(
        top1_agreement=_at(counted, agreement),
        student_mass=None if gathered else _at(counted, student_mass),
        teacher_mass=_at(counted, teacher_mass),
    )
    return result, stats


def _refuse(process_group: ProcessGroup | None) -> None:
    if process_group is not None:
        raise ValueError('process_group goes with backend "auto", "triton" or "torch", got "reference"')


def _at(counted: Tensor, column: Tensor) -> Tensor:
    """Values of the counted tokens in the tokens' shape, 0 elsewhere."""
    return torch.zeros(counted.shape, dtype=column.dtype, device=column.device).masked_scatter(
        counted, column
    )


def _counted(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask


def _hard_loss(y_s: Tensor, labels: Tensor | None, hard_weight: float, counted: Tensor) -> Tensor | float:
    if labels is None or hard_weight == 0:
        return 0.0
    return hard_weight * F.cross_entropy(y_s, labels[counted].long(), reduction="none")


def _reduce(
    loss: Tensor,
    token_weight: Tensor | None,
    counted: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    if token_weight is not None:
        loss = loss * token_weight.detach()[counted]
    if reduction == "none":
        return _at(counted, loss)
    count = max(len(loss), 1) if normalizer is None else normalizer
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Generalized JSD of Agarwal et al., https://arxiv.org/abs/2306.13649, with its limits at 0 and 1."""
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    pair = torch.stack([log_t + math.log(beta), log_s + math.log1p(-beta)])
    log_m = torch.logsumexp(pair.masked_fill((pair == -math.inf).all(0), 0), 0)  # 0 where both are absent
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) with 0 log 0 = 0."""
    gap = torch.where(log_p.exp() == 0, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def _stats(log_s: Tensor, log_t: Tensor, counted: Tensor) -> DistillStats:
    top_s, top_t = (log == log.amax(-1, keepdim=True) for log in (log_s, log_t))
    columns = (
        _entropy(log_s),
        _entropy(log_t),
        _kl(log_t, log_s),
        _kl(log_s, log_t),
        (top_s & top_t).any(-1),
    )
    return DistillStats(*(_at(counted, column) for column in columns))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p.exp() == 0, 0.0, log_p)).sum(-1)
