"""Row arithmetic of the divergence in PyTorch: from logits to losses, statistics and logit gradients.

Nothing here cancels when the two models are close. With d = log p_t - log p_s,

- d = (z_t - z_s) - c, where c = lse_t - lse_s = log1p(sum(e^z_t - e^z_s) / sum e^z_s): neither the
  difference of close logits nor c is a difference of two large rounded numbers (`_log_ratio`);
- p_t - p_s = sign(d) max(p_t, p_s) (1 - e^-|d|) (`_signed_gap`);
- KL(p || m) = sum p (e^x - 1 - x) with x = log m - log p: every term is >= 0, and a Taylor polynomial gives
  e^x - 1 - x near 0 (`_kl_terms`);
- log m - log p = log1p(k expm1(-|d|)) on the side where that argument is in (-1, 0] (`mixture_log_ratios`).

The same functions serve every floating dtype, eager and compiled, and are what the Triton kernels compute.
"""

from __future__ import annotations

import math
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunked.teacher import TeacherRows
from ..config import LossSettings
from ..parallel.vocab_shard import Vocabulary
from ..stats import DistillStats, RowResult
from .compiled import run_stage


class Divergence(Enum):
    """The three shapes of the generalized Jensen-Shannon divergence."""

    FORWARD = 0
    REVERSE = 1
    MIXTURE = 2

    @classmethod
    def of(cls, beta: float) -> Divergence:
        """The shape for a value of beta."""
        return cls.FORWARD if beta == 0 else cls.REVERSE if beta == 1 else cls.MIXTURE


def row_divergence(
    student_logits: Tensor,  # (n, V) as projected
    teacher: TeacherRows,  # (n, V) as projected
    weight: Tensor,  # (n,) factor of each row's loss
    settings: LossSettings,
    *,
    student_bias: Tensor | None = None,  # (V,)
    labels: Tensor | None = None,  # (n,) int64, see RowStep; needed if settings.hard_weight != 0
    grad: Tensor | None = None,  # (n, V) receives d(sum of losses) / d(student_logits); see below
    return_stats: bool = False,
    block_rows: int | None = None,  # rows held at once when eager; None: all
    vocabulary: Vocabulary | None = None,  # whose columns these are; None: all there are
    compiled: bool = False,
) -> RowResult:
    """Loss, statistics and logit gradient of each row.

    `grad` may be the object student_logits, to be overwritten, but no other view of the same memory:
    torch.compile computes nonsense for arguments that overlap when their offsets change.
    """
    n, n_columns = student_logits.shape
    vocabulary = vocabulary or Vocabulary.whole(n_columns)
    numbers = settings.as_tensor(student_logits.dtype)
    divergence = Divergence.of(settings.beta)
    run = partial(run_stage, n=n, block_rows=block_rows, compiled=compiled)

    def rows(block: slice) -> _Rows:
        return _Rows(
            student_logits[block],
            teacher.values[block],
            student_bias,
            teacher.bias,
            None if labels is None or settings.hard_weight == 0 else labels[block],
            numbers,
            settings.student_softcap is not None,
            settings.teacher_softcap is not None,
        )

    maxima = vocabulary.maximum(*run(_maxima, lambda block: (rows(block),)))
    sums = vocabulary.sum(*run(_sums, lambda block: (rows(block), *(column[block] for column in maxima))))
    norm = _Normalizers.of(*maxima, *sums)
    loss, kl_student, *stats = vocabulary.sum(
        *run(_losses, lambda block: (rows(block), norm.block(block), divergence, return_stats))
    )
    if grad is not None:

        def gradient_arguments(block: slice) -> tuple[Any, ...]:
            of_block = rows(block)
            kl = None if kl_student is None else kl_student[block]
            out = of_block.student if grad is student_logits else grad[block]
            return of_block, norm.block(block), divergence, kl, weight[block], out

        run(_gradient, gradient_arguments)
    return RowResult(loss * weight, DistillStats(*stats) if return_stats else None)


class _Rows(NamedTuple):
    """A block of rows of projections and what makes logits of them."""

    student: Tensor  # (n, V)
    teacher: Tensor  # (n, V)
    student_bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (n,)
    numbers: Tensor  # (9,) in the logits' dtype, so that new values never mean a new compilation
    student_has_softcap: bool
    teacher_has_softcap: bool


class _Normalizers(NamedTuple):
    """What a softmax needs of each row, (n, 1) each."""

    max_s: Tensor
    max_t: Tensor
    sum_s: Tensor  # of e^(z_s - max_s)
    sum_t: Tensor
    log_ratio: Tensor  # c = lse_t - lse_s
    max_y: Tensor  # of the student's logits at temperature 1
    sum_y: Tensor | None  # None without labels

    @classmethod
    def of(
        cls,
        max_s: Tensor,
        max_t: Tensor,
        max_y: Tensor,
        sum_s: Tensor,
        sum_t: Tensor,
        sum_y: Tensor | None,
        difference: Tensor,  # sum of e^(z_t - top) - e^(z_s - top)
    ) -> _Normalizers:
        """c from sums whose terms are small where the models are close."""
        log_ratio = _log_ratio(max_s, max_t, sum_s, sum_t, difference)
        return cls(max_s, max_t, sum_s, sum_t, log_ratio, max_y, sum_y)

    def block(self, block: slice) -> _Normalizers:
        """Those of a block of rows."""
        return _Normalizers(*(None if column is None else column[block] for column in self))  # pyright: ignore[reportArgumentType]


# Four stages, compiled one by one: what a stage needs of the one before is a few numbers per row, so that
# nothing of the logits' size is stored between them. These are maxima and sums over the columns: there the
# ranks meet that hold a block of the vocabulary each. Within a stage, an exponential that is used twice is
# written twice, as the compiler would store it.


def _maxima(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Of the student's and the teacher's logits over temperature and of the student's alone, (n, 1) each."""
    y_s, _, z_s, z_t = _logits(rows)
    return z_s.amax(-1, keepdim=True), z_t.amax(-1, keepdim=True), y_s.amax(-1, keepdim=True)


def _sums(
    rows: _Rows, max_s: Tensor, max_t: Tensor, max_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Sums of e^(z_s - max_s), e^(z_t - max_t), e^(y_s - max_y) and e^(z_t - top) - e^(z_s - top), (n, 1)."""
    y_s, _, z_s, z_t = _logits(rows)
    gap, top = delta(z_s, z_t), torch.maximum(max_s, max_t)
    sign = torch.where(gap > 0, -1.0, 1.0)
    terms = sign * (torch.maximum(z_s, z_t) - top).exp() * _expm1(-gap.abs())
    return (
        (z_s - max_s).exp().sum(-1, keepdim=True),
        (z_t - max_t).exp().sum(-1, keepdim=True),
        None if rows.labels is None else (y_s - max_y).exp().sum(-1, keepdim=True),
        terms.sum(-1, keepdim=True),
    )


def _log_ratio(max_s: Tensor, max_t: Tensor, sum_s: Tensor, sum_t: Tensor, difference: Tensor) -> Tensor:
    """c = lse_t - lse_s, with an error that shrinks with the distance between the models."""
    excess = difference / (sum_s * (max_s - torch.maximum(max_s, max_t)).exp())
    plain = (max_t - max_s) + (sum_t.log() - sum_s.log())
    return torch.where(excess.abs() < 0.5, torch.log1p(excess), plain)


def _losses(
    rows: _Rows, norm: _Normalizers, divergence: Divergence, return_stats: bool
) -> tuple[Tensor | None, ...]:
    """Loss of each row, the KL(p_s || p_t or mixture) that its gradient needs, columns of DistillStats."""
    beta, not_beta, *_, hard_weight, soft_weight = rows.numbers.unbind()
    y_s, _, z_s, z_t = _logits(rows)
    p_s, p_t, d = _distributions(z_s, z_t, norm)
    gap = _signed_gap(p_s, p_t, d)

    kl_student = None
    if divergence is Divergence.FORWARD:
        soft = _kl_terms(p_t, -d, -gap).sum(-1)
    elif divergence is Divergence.REVERSE:
        soft = kl_student = _kl_terms(p_s, d, gap).sum(-1)
    else:
        u, v = mixture_log_ratios(d, beta, not_beta)
        kl_student = _kl_terms(p_s, u, beta * gap).sum(-1)
        soft = beta * _kl_terms(p_t, v, -not_beta * gap).sum(-1) + not_beta * kl_student
    loss = soft_weight * soft

    if rows.labels is not None and norm.sum_y is not None:
        label = rows.labels.clamp(0, y_s.shape[-1] - 1)
        surprise = norm.sum_y.log() + (norm.max_y - y_s.gather(-1, label.unsqueeze(-1)))
        loss = loss + torch.where(rows.labels == label, hard_weight * surprise.squeeze(-1), 0.0)

    if not return_stats:
        return loss, kl_student
    return (
        loss,
        kl_student,
        times(p_s, norm.sum_s.log() - (z_s - norm.max_s)).sum(-1),
        times(p_t, norm.sum_t.log() - (z_t - norm.max_t)).sum(-1),
        _kl_terms(p_t, -d, -gap).sum(-1),
        _kl_terms(p_s, d, gap).sum(-1),
        ((z_s == norm.max_s) & (z_t == norm.max_t)).any(-1),
    )


def _gradient(
    rows: _Rows,
    norm: _Normalizers,
    divergence: Divergence,
    kl_student: Tensor | None,
    weight: Tensor,
    out: Tensor,  # (n, V), may be rows.student
) -> tuple[()]:
    """out = weight * d(loss) / d(student's projection)."""
    beta, not_beta, inv_temperature, *_, hard_weight, soft_weight = rows.numbers.unbind()
    y_s, dy_s, z_s, z_t = _logits(rows)
    p_s, p_t, d = _distributions(z_s, z_t, norm)
    if divergence is Divergence.FORWARD or kl_student is None:
        grad = -_signed_gap(p_s, p_t, d)
    elif divergence is Divergence.REVERSE:
        grad = times(p_s, -d - kl_student.unsqueeze(-1))
    else:
        u, _ = mixture_log_ratios(d, beta, not_beta)
        grad = not_beta * times(p_s, -u - kl_student.unsqueeze(-1))
    grad = grad * (inv_temperature * soft_weight)
    if rows.labels is not None and norm.sum_y is not None:
        has_label = (rows.labels >= 0).unsqueeze(-1)
        columns = torch.arange(y_s.shape[-1], device=y_s.device)
        one_hot = (columns == rows.labels.unsqueeze(-1)).to(y_s.dtype)
        residual = (y_s - norm.max_y).exp() / norm.sum_y - one_hot
        grad = grad + torch.where(has_label, hard_weight * residual, 0.0)
    out.copy_(grad * dy_s * weight.unsqueeze(-1))
    return ()


def _logits(rows: _Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's logits, their derivative by the projection, and both models' logits over temperature."""
    _, _, inv_temperature, s_scale, t_scale, s_softcap, t_softcap, *_ = rows.numbers.unbind()
    y_s, dy_s = transform(
        rows.student, rows.student_bias, s_scale, s_softcap if rows.student_has_softcap else None
    )
    y_t, _ = transform(
        rows.teacher, rows.teacher_bias, t_scale, t_softcap if rows.teacher_has_softcap else None
    )
    return y_s, dy_s, y_s * inv_temperature, y_t * inv_temperature


def _distributions(z_s: Tensor, z_t: Tensor, norm: _Normalizers) -> tuple[Tensor, Tensor, Tensor]:
    """p_s, p_t and d = log p_t - log p_s."""
    p_s = (z_s - norm.max_s).exp() / norm.sum_s
    p_t = (z_t - norm.max_t).exp() / norm.sum_t
    return p_s, p_t, delta(z_s, z_t) - norm.log_ratio


def delta(z_s: Tensor, z_t: Tensor) -> Tensor:
    """z_t - z_s, where two absent tokens (-inf) do not differ."""
    return torch.where(z_t == z_s, 0.0, z_t - z_s)


def transform(x: Tensor, bias: Tensor | None, scale: Tensor, softcap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits from projections: bias, scale, softcap; and their derivative with respect to the projection."""
    if bias is not None:
        x = x + bias
    x = x * scale
    if softcap is None:
        return x, scale
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, scale * (1 - tanh * tanh)


def _signed_gap(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """b - a for positive a and b, given log(b / a)."""
    return torch.where(log_ratio > 0, -b, a) * _expm1(-log_ratio.abs())


def _kl_terms(p: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    """p (e^x - 1 - x), the terms of KL(p || m) with x = log m - log p and gap = m - p. Never negative."""
    near = p * (x * x) * _series(x)
    return torch.where(_series_serves(x), near, (gap - times(p, x)).clamp_min(0.0))


# The constants below are literals: torch.compile(dynamic=True) takes a global float for an argument.


def _series_serves(x: Tensor) -> Tensor:
    """Where `_series` is exact enough; elsewhere the plain difference loses at most 3 bits."""
    return x.abs() < 0.5


def _series(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2 near 0 to the precision of x's dtype, by its Taylor polynomial."""
    terms = 14 if x.dtype == torch.float64 else 8
    value = torch.full_like(x, 1 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        value = value * x + 1 / math.factorial(k)
    return value


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x <= 0. (torch.expm1 is exact when eager, but compiled for the CPU it is exp(x) - 1.)"""
    return torch.where(_series_serves(x), x + x * x * _series(x), torch.exp(x) - 1)


def mixture_log_ratios(d: Tensor, beta: Tensor, not_beta: Tensor) -> tuple[Tensor, Tensor]:
    """log m - log p_s and log m - log p_t for m = beta p_t + (1 - beta) p_s."""
    teacher_leads = d > 0
    # Arithmetic, not torch.where: that would copy the two numbers to a GPU and wait for it.
    share = beta + teacher_leads.to(d.dtype) * (not_beta - beta)
    toward_larger = torch.log1p(share * _expm1(-d.abs()))
    toward_smaller = toward_larger + d.abs()
    return (
        torch.where(teacher_leads, toward_smaller, toward_larger),
        torch.where(teacher_leads, toward_larger, toward_smaller),
    )


def times(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 however infinite x is."""
    return torch.where(p == 0, 0.0, p * x)
