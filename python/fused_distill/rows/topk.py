"""Row arithmetic for a top-k teacher: K outcomes by name, everything else of the vocabulary as the rest.

The K columns are taken out of the student's logits and marked with -inf, so that one pass over the row gives
the sum of the rest's exponentials directly, not as a difference of two nearly equal masses. What follows has
K + 1 numbers per row and is computed in float64, so that close models keep their digits: a log-probability
minus a logit is not exact in float32, as the difference of two close logits is.

The gradient is one scalar times the softmax of the rest, written in a second pass, plus K corrections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunked.teacher import TeacherRows, wide_dtype
from ..config import LossSettings
from ..parallel.vocab_shard import Vocabulary
from ..stats import DistillStats, RowResult
from .compiled import run_stage
from .full_torch import (
    Divergence,
    delta,
    mixture_log_ratios,
    row_divergence,
    times,
    transform,
)

# Temporaries in float64 that a row of K + 1 outcomes needs at once.
SUPPORT_TENSORS = 40

# What log-probabilities in float32 do not tell from 0; it keeps reverse KL finite. TRL has the same.
LEAST_TEACHER_REST = 1e-7


class RestStatistics(NamedTuple):
    """Log-sum-exp parts of the columns outside the support, (n,) each; the sums in float64."""

    max_z: Tensor  # of the logits over temperature; -inf where there is no such column
    sum_z: Tensor  # of e^(z - max_z)
    max_y: Tensor  # of the logits at temperature 1
    sum_y: Tensor


class RestOperations(NamedTuple):
    """The innermost step, one pair per backend: see `rest_statistics` and `rest_gradient`."""

    statistics: Callable[..., RestStatistics]
    gradient: Callable[..., None]


@dataclass(frozen=True)
class TopKRows:
    """The row step of one tail. `rest` is None where the logits are those of the K ids alone."""

    tail: str
    rest: RestOperations | None

    def __call__(
        self,
        student_logits: Tensor,  # (n, V), overwritten; (n, K) without `rest`
        teacher: TeacherRows,
        weight: Tensor,  # (n,)
        settings: LossSettings,
        *,
        student_bias: Tensor | None,  # (V,)
        labels: Tensor | None,  # (n,)
        grad: Tensor | None,  # like student_logits, may be the same
        return_stats: bool,
        block_rows: int,
        vocabulary: Vocabulary,
    ) -> RowResult:
        """Losses and statistics of n rows, their logit gradient in `grad`."""
        assert teacher.ids is not None
        ids, held = teacher.ids, teacher.values != -torch.inf
        if teacher.here is not None:
            held &= teacher.here
        y, slope = _support_logits(
            student_logits, teacher, settings, student_bias, gathered=self.rest is None
        )
        label = None if labels is None else _Label.of(student_logits, labels, settings, student_bias)
        rest = None
        if self.rest is not None:
            _exclude(student_logits, ids, held)
            rest = self.rest.statistics(student_logits, student_bias, settings, block_rows=block_rows)
        y, label, rest = _over_ranks(vocabulary, y, label, rest)
        support = _Support(held, y, y / settings.temperature, teacher.values)

        wide_weight = weight.to(support.z.dtype)
        soft, grad_support, grad_rest, stats = _divergence(self.tail, support, rest, settings, return_stats)
        loss = settings.soft_weight * soft
        scale = wide_weight * (settings.soft_weight / settings.temperature)
        grad_support, grad_rest = grad_support * scale.unsqueeze(-1), grad_rest * scale
        hard = None
        if label is not None and rest is not None:
            hard = _HardLoss.of(label, support, ids, rest, wide_weight, settings.hard_weight)
            loss, grad_support = loss + hard.loss, grad_support + hard.grad_support

        if grad is not None:
            grad_support = (grad_support * slope).to(grad.dtype)
            if teacher.here is not None:
                grad_support = torch.where(teacher.here, grad_support, 0.0)
            if self.rest is None or rest is None:
                grad.copy_(grad_support)
            else:
                factor_z = torch.where(rest.sum_z == 0, 0.0, grad_rest / rest.sum_z)
                factor_y = None if hard is None else hard.factor_y
                write_rest, rows = self.rest.gradient, (student_logits, student_bias, settings, rest)
                write_rest(*rows, factor_z, factor_y, grad, block_rows=block_rows)
                if label is not None and hard is not None:
                    label.write_gradient(hard, factor_z, rest.max_z, settings.temperature, grad)
                grad.scatter_add_(-1, ids, grad_support)
        dtype = student_logits.dtype
        if stats is not None:
            stats = stats.map(lambda c: c if c.dtype == torch.bool else c.to(dtype))
        return RowResult((wide_weight * loss).to(dtype), stats)


class _Support(NamedTuple):
    """The K outcomes by name, in float64; an absent one has probability 0 in both models."""

    held: Tensor  # (n, K) bool: present, and its column is here
    y: Tensor  # (n, K) student's logits at temperature 1, -inf where absent
    z: Tensor  # (n, K) y over temperature
    logprobs: Tensor  # (n, K) the teacher's

    @property
    def present(self) -> Tensor:
        """(n, K) bool."""
        return self.logprobs != -torch.inf


class _Label(NamedTuple):
    """The label's column of each row, read before any column is excluded."""

    column: Tensor  # (n, 1), any where the label is not here
    present: Tensor  # (n,) bool
    here: Tensor  # (n,) bool
    y: Tensor  # (n,) float64 logit at temperature 1
    slope: Tensor  # (n,) or 0-d, where it is here

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, settings: LossSettings, bias: Tensor | None) -> _Label:
        column, dtype = labels.clamp(0, logits.shape[-1] - 1), wide_dtype(logits.device)
        here = labels == column
        x = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(dtype)
        y, slope = _transform(x, None if bias is None else bias[column].to(dtype), settings)
        return cls(column.unsqueeze(-1), labels >= 0, here, torch.where(here, y, 0.0), slope)

    def write_gradient(
        self, hard: _HardLoss, factor_z: Tensor, max_z: Tensor, temperature: float, grad: Tensor
    ) -> None:
        """The label's entry as a whole, where it lies in the rest: p - 1 has no digits in half precision."""
        soft = factor_z * (self.y / temperature - max_z).exp()
        entry = ((soft + hard.grad_label) * self.slope).to(grad.dtype).unsqueeze(-1)
        in_rest = (self.here & ~hard.label_in_support).unsqueeze(-1)
        grad.scatter_(-1, self.column, torch.where(in_rest, entry, grad.gather(-1, self.column)))


class _HardLoss(NamedTuple):
    """The cross entropy with the label over the whole vocabulary; gradients by y."""

    loss: Tensor  # (n,) times hard_weight, not the row's weight
    grad_support: Tensor  # (n, K)
    factor_y: Tensor  # (n,) of e^(y - max_y) in the rest
    grad_label: Tensor  # (n,)
    label_in_support: Tensor  # (n,) bool

    @classmethod
    def of(
        cls,
        label: _Label,
        support: _Support,
        ids: Tensor,
        rest: RestStatistics,
        weight: Tensor,
        hard_weight: float,
    ) -> _HardLoss:
        log_normalizer = _log_normalizer(support.y, rest.max_y, rest.sum_y)
        log_p = label.y - log_normalizer
        weight = weight * hard_weight * label.present
        at_label = (ids == label.column) & support.held & label.here.unsqueeze(-1)
        p_support = (support.y - log_normalizer.unsqueeze(-1)).exp()
        return cls(
            torch.where(label.present, -hard_weight * log_p, 0.0),
            weight.unsqueeze(-1) * (p_support - at_label.to(p_support.dtype)),
            weight * (rest.max_y - log_normalizer).exp(),
            weight * log_p.expm1(),
            at_label.any(-1),
        )


def _transform(x: Tensor, bias: Tensor | None, settings: LossSettings) -> tuple[Tensor, Tensor]:
    _, _, _, scale, _, softcap, *_ = settings.as_tensor(x.dtype).unbind()
    return transform(x, bias, scale, softcap if settings.student_softcap is not None else None)


def _support_logits(
    logits: Tensor, teacher: TeacherRows, settings: LossSettings, bias: Tensor | None, *, gathered: bool
) -> tuple[Tensor, Tensor]:
    """Logits of the support (n, K) at temperature 1, -inf where absent, 0 where not here.

    And their derivative by the projection, (n, K) or 0-d, where here.
    """
    assert teacher.ids is not None
    dtype = teacher.values.dtype
    x = logits if gathered else logits.gather(-1, teacher.ids)
    y, slope = _transform(x.to(dtype), None if bias is None else bias[teacher.ids].to(dtype), settings)
    y = torch.where(teacher.values != -torch.inf, y, -torch.inf)
    return y if teacher.here is None else torch.where(teacher.here, y, 0.0), slope


def _over_ranks(
    vocabulary: Vocabulary, y: Tensor, label: _Label | None, rest: RestStatistics | None
) -> tuple[Tensor, _Label | None, RestStatistics | None]:
    """Logits of the support and the label, and the rest, of the whole vocabulary from this rank's columns."""
    if vocabulary.group is None:
        return y, label, rest
    if rest is None:
        (y,) = vocabulary.sum(y)
        return y, None, None
    max_z, max_y = vocabulary.maximum(rest.max_z, rest.max_y)
    y, label_y, sum_z, sum_y = vocabulary.sum(
        y,
        None if label is None else label.y,
        rest.sum_z * exp_below(rest.max_z, max_z),
        rest.sum_y * exp_below(rest.max_y, max_y),
    )
    label = None if label is None else label._replace(y=label_y)
    return y, label, RestStatistics(max_z, sum_z, max_y, sum_y)


def _exclude(logits: Tensor, ids: Tensor, held: Tensor) -> None:
    """-inf in the columns of the support. Other entries, whose ids may be any columns, change nothing."""
    marks = torch.where(held, -torch.inf, torch.inf).to(logits.dtype)
    logits.scatter_reduce_(-1, ids, marks, "amin")


def _log_normalizer(named: Tensor, rest_max: Tensor, rest_sum: Tensor) -> Tensor:
    """Log-sum-exp of the K named logits and the rest, (n,)."""
    return torch.logaddexp(named.logsumexp(-1), rest_max + rest_sum.log())


def _divergence(
    tail: str,
    support: _Support,
    rest: RestStatistics | None,
    settings: LossSettings,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, DistillStats | None]:
    """The divergence (n,), its gradients by z (n, K) and by the rest's log-sum-exp (n,), statistics."""
    z, logprobs = support.z, support.logprobs
    if tail == "truncate":
        assert rest is not None
        log_normalizer = _log_normalizer(z, rest.max_z, rest.sum_z)
        log_s = z - log_normalizer.unsqueeze(-1)
        loss, grad_logp, stats = _truncated(log_s, logprobs, settings, return_stats)
        total = grad_logp.sum(-1)
        grad_support = grad_logp - log_s.exp() * total.unsqueeze(-1)
        grad_rest = -total * rest.sum_z * (rest.max_z - log_normalizer).exp()
    else:
        if tail == "bucket":
            assert rest is not None
            named = logprobs.exp().sum(-1)
            rest_t = torch.where(rest.sum_z == 0, 0.0, (1 - named).clamp_min(LEAST_TEACHER_REST))
            z = torch.cat([z, (rest.max_z + rest.sum_z.log()).unsqueeze(-1)], -1)
            logprobs = torch.cat([logprobs, rest_t.log().unsqueeze(-1)], -1)
        else:
            # A row without entries, or whose entries the student forbids, has one outcome for both models.
            alone = torch.zeros_like(support.present)
            alone[:, 0] = (z == -torch.inf).all(-1)
            logprobs = logprobs.masked_fill(alone.any(-1, keepdim=True), -torch.inf)
            z, logprobs = z.masked_fill(alone, 0.0), logprobs.masked_fill(alone, 0.0)
        outcomes = LossSettings(beta=settings.beta)
        grad = torch.empty_like(z)
        ones = torch.ones_like(z[:, 0])
        loss, stats = row_divergence(
            z, TeacherRows(logprobs), ones, outcomes, grad=grad, return_stats=return_stats
        )
        k = support.z.shape[-1]
        grad_support, grad_rest = grad[:, :k], grad[:, k] if tail == "bucket" else torch.zeros_like(ones)
    if stats is not None:
        stats = stats._replace(**_support_stats(support, rest))
    return loss, grad_support, grad_rest, stats


def _truncated(
    log_s: Tensor, log_t: Tensor, settings: LossSettings, return_stats: bool
) -> tuple[Tensor, Tensor, DistillStats | None]:
    """Plain sums over the support, from (n, K): divergence, its gradient by log_s, statistics."""
    beta, not_beta, *_ = settings.as_tensor(log_s.dtype).unbind()
    p_s, p_t, d = log_s.exp(), log_t.exp(), delta(log_s, log_t)
    forward, reverse = times(p_t, d).sum(-1), times(p_s, -d).sum(-1)
    divergence = Divergence.of(settings.beta)
    if divergence is Divergence.FORWARD:
        loss, grad = forward, -p_t
    elif divergence is Divergence.REVERSE:
        loss, grad = reverse, times(p_s, 1 - d)
    else:
        u, v = mixture_log_ratios(d, beta, not_beta)
        loss = -beta * times(p_t, v).sum(-1) - not_beta * times(p_s, u).sum(-1)
        grad = not_beta * times(p_s, -u)
    stats = None
    if return_stats:
        entropies = (times(p_s, -log_s).sum(-1), times(p_t, -log_t).sum(-1))
        stats = DistillStats(*entropies, forward, reverse, torch.zeros_like(loss, dtype=torch.bool))
    return loss, grad, stats


def _support_stats(support: _Support, rest: RestStatistics | None) -> dict[str, Tensor | None]:
    """Top-1 agreement and both models' mass on the support."""
    top_s, top_t = support.z.amax(-1, keepdim=True), support.logprobs.amax(-1, keepdim=True)
    student_mass = None
    if rest is not None:
        top_s = torch.maximum(top_s, rest.max_z.unsqueeze(-1))
        log_normalizer = _log_normalizer(support.z, rest.max_z, rest.sum_z)
        student_mass = (support.z.logsumexp(-1) - log_normalizer).exp()
    shared = (support.z == top_s) & (support.logprobs == top_t) & support.present
    return {
        "top1_agreement": shared.any(-1),
        "student_mass": student_mass,
        "teacher_mass": support.logprobs.exp().sum(-1),
    }


def rest_statistics(
    logits: Tensor,  # (n, V) projections, -inf in the columns of the support
    bias: Tensor | None,  # (V,)
    settings: LossSettings,
    *,
    block_rows: int,
    compiled: bool = False,
) -> RestStatistics:
    """Log-sum-exp parts of each row's other columns, in PyTorch."""
    numbers, has_softcap = settings.as_tensor(logits.dtype), settings.student_softcap is not None
    same = not settings.needs_two_softmaxes
    run = partial(run_stage, n=len(logits), block_rows=block_rows, compiled=compiled)

    def rows(block: slice) -> tuple[Any, ...]:
        return logits[block], bias, numbers, has_softcap, same

    max_z, max_y = run(_maxima, rows)
    sum_z, sum_y = run(_sums, lambda block: (*rows(block), max_z[block], max_y[block]))
    wide = sum_z.dtype
    return RestStatistics(*(column.squeeze(-1).to(wide) for column in (max_z, sum_z, max_y, sum_y)))


def rest_gradient(
    logits: Tensor,  # (n, V) projections, -inf in the columns of the support
    bias: Tensor | None,  # (V,)
    settings: LossSettings,
    rest: RestStatistics,
    factor_z: Tensor,  # (n,)
    factor_y: Tensor | None,  # (n,)
    out: Tensor,  # (n, V), may be `logits` itself, but no other view of the same memory
    *,
    block_rows: int,
    compiled: bool = False,
) -> None:
    """out = slope * (factor_z e^(z - max_z) + factor_y e^(y - max_y)), 0 in the columns of the support."""
    numbers, has_softcap = settings.as_tensor(logits.dtype), settings.student_softcap is not None

    def column(values: Tensor) -> Tensor:
        return values.to(logits.dtype).unsqueeze(-1)

    max_z, max_y, factor_z = column(rest.max_z), column(rest.max_y), column(factor_z)
    factor_y = None if factor_y is None else column(factor_y)

    def arguments(block: slice) -> tuple[Any, ...]:
        x = logits[block]
        return (
            x,
            bias,
            numbers,
            has_softcap,
            max_z[block],
            factor_z[block],
            max_y[block],
            None if factor_y is None else factor_y[block],
            x if out is logits else out[block],
        )

    run_stage(_gradient, arguments, len(logits), block_rows=block_rows, compiled=compiled)


def _rest_logits(
    x: Tensor, bias: Tensor | None, numbers: Tensor, has_softcap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, its derivative by the projection, and z; -inf where excluded."""
    _, _, inv_temperature, scale, _, softcap, *_ = numbers.unbind()
    y, slope = transform(x, bias, scale, softcap if has_softcap else None)
    if has_softcap:
        y = torch.where(x == -torch.inf, -torch.inf, y)
    return y, slope, y * inv_temperature


def _maxima(
    x: Tensor, bias: Tensor | None, numbers: Tensor, has_softcap: bool, same: bool
) -> tuple[Tensor, Tensor]:
    y, _, z = _rest_logits(x, bias, numbers, has_softcap)
    max_z = z.amax(-1, keepdim=True)
    return max_z, max_z if same else y.amax(-1, keepdim=True)


def _sums(
    x: Tensor,
    bias: Tensor | None,
    numbers: Tensor,
    has_softcap: bool,
    same: bool,
    max_z: Tensor,
    max_y: Tensor,
) -> tuple[Tensor, Tensor]:
    y, _, z = _rest_logits(x, bias, numbers, has_softcap)
    wide = wide_dtype(x.device)
    sum_z = exp_below(z, max_z).sum(-1, keepdim=True, dtype=wide)
    return sum_z, sum_z if same else exp_below(y, max_y).sum(-1, keepdim=True, dtype=wide)


def _gradient(
    x: Tensor,
    bias: Tensor | None,
    numbers: Tensor,
    has_softcap: bool,
    max_z: Tensor,
    factor_z: Tensor,
    max_y: Tensor,
    factor_y: Tensor | None,
    out: Tensor,
) -> tuple[()]:
    y, slope, z = _rest_logits(x, bias, numbers, has_softcap)
    grad = factor_z * exp_below(z, max_z)
    if factor_y is not None:
        grad = grad + factor_y * exp_below(y, max_y)
    out.copy_(grad * slope)
    return ()


def exp_below(z: Tensor, top: Tensor) -> Tensor:
    """e^(z - top), 0 where top is -inf."""
    return (z - torch.where(top == -torch.inf, 0.0, top)).exp()
