"""The losses in plain PyTorch: every logit materialised, in the inputs' dtype, differentiated by autograd.

Slow and large on purpose. The tests compare every backend with it in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._settings import DistillStats


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
) -> Tensor | tuple[Tensor, DistillStats]:
    """`fused_linear_jsd` by definition, unchecked; workspace_bytes and backend do nothing here."""
    del workspace_bytes, backend
    shape = student_hidden.shape[:-1]
    counted = torch.ones(shape, dtype=torch.bool, device=student_hidden.device) if mask is None else mask
    vocab_size = vocab_size or min(len(student_weight), len(teacher_weight))

    y_s = _logits(student_hidden[counted], student_weight, student_bias, student_logit_scale, student_softcap)
    y_t = _logits(teacher_hidden[counted], teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    y_s, y_t = y_s[:, :vocab_size], y_t[:, :vocab_size].detach()
    log_s, log_t = F.log_softmax(y_s / temperature, dim=-1), F.log_softmax(y_t / temperature, dim=-1)

    loss = soft_weight * _jsd(log_s, log_t, beta)
    if labels is not None and hard_weight != 0:
        loss = loss + hard_weight * F.cross_entropy(y_s, labels[counted].long(), reduction="none")
    if token_weight is not None:
        loss = loss * token_weight.detach()[counted]

    if reduction == "none":
        result = torch.zeros(shape, dtype=loss.dtype, device=loss.device).masked_scatter(counted, loss)
    else:
        count = max(len(loss), 1) if normalizer is None else normalizer
        result = loss.sum() / count if reduction == "mean" else loss.sum()
    return (result, _stats(log_s.detach(), log_t, counted)) if return_stats else result


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
    zeros = DistillStats.zeros(tuple(counted.shape), log_s.dtype, log_s.device)
    return DistillStats(
        *(zero.masked_scatter(counted, column) for zero, column in zip(zeros, columns, strict=True))
    )


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p.exp() == 0, 0.0, log_p)).sum(-1)
