"""Row loss for a full-vocabulary teacher in PyTorch: logits to losses, statistics and logit gradients.

It runs in four stages: `_maxima`, `_sums`, `_losses` and `_gradient`. A stage passes only a few numbers per
row to the next, so that nothing of the logits' size is stored between stages. These numbers are maxima and
sums over columns, which vocabulary-parallel ranks all-reduce between stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunked.gemm import float64_if_supported
from ..chunked.workspace import Workspace
from ..config import DivergenceForm, LossConfig, Scalars
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import StudentRows, TailStatistics, TeacherRows
from .divergences import Outcomes, led_parts, terms_and_slopes
from .elementwise import (
    gap_beyond,
    kl_terms,
    log_ratio,
    mixture_log_ratios,
    mul_zero_safe,
    stable_prob_diff,
    transform_logits,
)
from .row_blocks import in_blocks, temporaries
from .surplus import Surplus
from .tail_torch import TorchTail

# Divergences whose unclipped gradient takes a plain KL divergence, so that nothing large cancels in it.
_BY_KL = (
    DivergenceForm.FORWARD_KL,
    DivergenceForm.REVERSE_KL,
    DivergenceForm.MIXTURE,
    DivergenceForm.MIXED_KL,
)
_TEMPORARIES = 26  # tensors of a block's size that the largest stage holds at once


@dataclass(frozen=True)
class TorchJSD:
    """The divergence of each row, in PyTorch."""

    device_type: str = "cpu"

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the temporaries of a block."""
        return temporaries(_TEMPORARIES, n_columns, dtype, self.device_type)

    def __call__(
        self,
        student: StudentRows,
        teacher: TeacherRows,
        config: LossConfig,
        *,
        grad: Tensor | None = None,
        group: ShardGroup | None = None,
        block_rows: int | None = None,
    ) -> RowResult:
        """Return losses and statistics; see `RowLoss`."""
        group = group or ShardGroup()
        scalars = config.scalars(torch.float64)
        run = partial(in_blocks, n=len(student.logits), block_rows=block_rows)

        width = teacher.values.shape[1]
        compared, surplus_rows = student, None
        if student.logits.shape[1] > width:
            compared, surplus_rows = student.split(width)
        biases = (compared.bias, teacher.bias)
        rounds_logits = config.transforms_logits or any(bias is not None for bias in biases)

        def rows(block: slice) -> _Rows:
            return _Rows(
                compared.logits[block],
                teacher.values[block],
                *biases,
                None if student.labels is None else student.labels[block],
                None if student.reverse_weight is None else student.reverse_weight[block],
                scalars,
                config.student_softcap is not None,
                config.teacher_softcap is not None,
                rounds_logits,
            )

        maxima = group.all_reduce_max(*run(_maxima, lambda block: (rows(block),)))
        sum_s, sum_t, sum_y, diff_sum = group.all_reduce_sum(
            *run(_sums, lambda block: (rows(block), *(column[block] for column in maxima)))
        )
        max_s, max_t, max_y = maxima
        lse_diff = log_ratio(sum_s, sum_t, diff_sum)
        softmax = _SoftmaxParts(max_s, max_t, sum_s, sum_t, lse_diff, max_y, sum_y)
        surplus, passes = None, TorchTail(self.device_type)
        if surplus_rows is not None:
            tail = passes.statistics(surplus_rows.logits, surplus_rows.bias, config, block_rows=block_rows)
            softmax, surplus = softmax.with_surplus(tail)
        kind = config.form, config.entry_clip is not None
        loss, centre, *stats = group.all_reduce_sum(
            *run(_losses, lambda block: (rows(block), softmax.block(block), *kind, config.return_stats))
        )
        if surplus is not None:
            loss, centre, stats = surplus.added_to(loss, centre, stats, config, student.reverse_weight)
        result_stats = DistillStats(*stats) if config.return_stats else None
        student = student.weighted(result_stats)
        if grad is not None:

            def gradient_arguments(block: slice) -> tuple[Any, ...]:
                block_of_rows = rows(block)
                centre_of_block = None if centre is None else centre[block]
                out, weight = grad[block, :width], student.grad_weight[block]
                return block_of_rows, softmax.block(block), *kind, centre_of_block, weight, out

            run(_gradient, gradient_arguments)
            if surplus is not None and surplus_rows is not None:
                x, bias, weight = surplus_rows.logits, surplus_rows.bias, student.grad_weight
                factors = surplus.gradient_factors(
                    config, centre, weight, student.labels, student.reverse_weight
                )
                out = grad[:, width:]
                passes.gradient(x, bias, config, surplus.tail, *factors, out, block_rows=block_rows)
        return RowResult(loss * student.weight, result_stats)


class _Rows(NamedTuple):
    """A block of projections and the numbers that turn them into logits."""

    student: Tensor  # (n, V)
    teacher: Tensor  # (n, V)
    student_bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (n,)
    reverse_weight: Tensor | None  # (n,)
    scalars: Tensor  # (13,) float64, see `Scalars`
    student_has_softcap: bool
    teacher_has_softcap: bool
    rounds_logits: bool  # logits over temperature are not the projections themselves

    def numbers(self, dtype: torch.dtype) -> Scalars:
        """Return the scalars in a dtype."""
        return Scalars(*self.scalars.to(dtype).unbind())


class _SoftmaxParts(NamedTuple):
    """The parts of each row's softmaxes, (n, 1) each."""

    max_s: Tensor
    max_t: Tensor
    sum_s: Tensor  # sum of e^(z_s - max_s)
    sum_t: Tensor
    lse_diff: Tensor  # log(sum_t / sum_s)
    max_y: Tensor  # of the student's logits at temperature 1
    sum_y: Tensor | None  # None without labels

    def block(self, block: slice) -> _SoftmaxParts:
        """Return the parts of a block of rows."""
        return _SoftmaxParts(*(None if column is None else column[block] for column in self))  # pyright: ignore[reportArgumentType]

    def with_surplus(self, tail: TailStatistics) -> tuple[_SoftmaxParts, Surplus]:
        """Return the parts of the student's softmax over the surplus rows too, and their outcome."""
        wide, dtype = tail.sum_z.dtype, self.sum_s.dtype
        max_s, max_y = self.max_s.squeeze(-1).to(wide), self.max_y.squeeze(-1).to(wide)
        lse = max_s + self.sum_s.squeeze(-1).to(wide).log()
        lse_y = lse if self.sum_y is None else max_y + self.sum_y.squeeze(-1).to(wide).log()
        surplus = Surplus.beside(lse, lse_y, tail)
        (top_s, sum_s), (top_y, sum_y) = surplus.softmax_parts(max_s, max_y)

        def column(values: Tensor) -> Tensor:
            return values.to(dtype).unsqueeze(-1)

        parts = self._replace(
            max_s=column(top_s),
            sum_s=column(sum_s),
            lse_diff=self.lse_diff + column(surplus.log_rest + (top_s - max_s)),
            max_y=column(top_y),
            sum_y=None if self.sum_y is None else column(sum_y),
        )
        return parts, surplus


def _maxima(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return (n, 1) maxima of both models' logits over temperature and of the student's at temperature 1."""
    y_s, _, z_s, z_t = _logits(rows)
    return z_s.amax(-1, keepdim=True), z_t.amax(-1, keepdim=True), y_s.amax(-1, keepdim=True)


def _sums(
    rows: _Rows, max_s: Tensor, max_t: Tensor, max_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return (n, 1) sums of e^(z_s - max_s), e^(z_t - max_t), e^(y_s - max_y) and probability differences."""
    y_s, _, z_s, z_t = _logits(rows)
    exp_s, exp_t = (z_s - max_s).exp(), (z_t - max_t).exp()
    terms = stable_prob_diff(exp_s, exp_t, _gap_beyond(rows, z_s, z_t, max_s, max_t))
    return (
        exp_s.sum(-1, keepdim=True),
        exp_t.sum(-1, keepdim=True),
        None if rows.labels is None else (y_s - max_y).exp().sum(-1, keepdim=True),
        terms.sum(-1, keepdim=True),
    )


def _losses(
    rows: _Rows, softmax: _SoftmaxParts, form: DivergenceForm, clips: bool, return_stats: bool
) -> tuple[Tensor | None, ...]:
    """Return (n,) losses, what the gradient subtracts, and with return_stats their statistics.

    The second result is the sum of `slope`, without the weight b for a mixture of "jsd", where it is
    KL(p_s || m), and for reverse KL, also in "mixed_kl". It is None for forward KL, whose slopes add up to 0.
    For the total variation it is (n, 2), see `led_parts`.
    """
    scalars = rows.numbers(rows.student.dtype)
    beta, one_minus_beta = scalars.teacher_share, scalars.student_share
    y_s, _, z_s, z_t = _logits(rows)
    p_s, p_t, d = _distributions(rows, z_s, z_t, softmax)
    prob_diff = stable_prob_diff(p_s, p_t, d)

    centre = None
    if clips or form not in _BY_KL:
        terms, slopes = terms_and_slopes(
            Outcomes(p_s, p_t, d, prob_diff), scalars, rows.reverse_weight, form, clips
        )
        soft, centre = terms.sum(-1), slopes.sum(-1)
        if form is DivergenceForm.TOTAL_VARIATION:
            centre = torch.stack([part.sum(-1) for part in led_parts(p_s, slopes)], -1)
    elif form is DivergenceForm.FORWARD_KL:
        soft = kl_terms(p_t, -d, -prob_diff).sum(-1)
    elif form is not DivergenceForm.MIXTURE:
        soft = centre = kl_terms(p_s, d, prob_diff).sum(-1)
        if rows.reverse_weight is not None:  # a weight of 0 drops an infinite divergence
            forward = kl_terms(p_t, -d, -prob_diff).sum(-1)
            weight = rows.reverse_weight
            soft = mul_zero_safe(1 - weight, forward) + mul_zero_safe(weight, centre)
    else:
        u, v = mixture_log_ratios(d, beta, one_minus_beta)
        centre = kl_terms(p_s, u, beta * prob_diff).sum(-1)
        soft = beta * kl_terms(p_t, v, -one_minus_beta * prob_diff).sum(-1) + one_minus_beta * centre
    loss = scalars.soft_weight * soft

    if rows.labels is not None and softmax.sum_y is not None:
        label = rows.labels.clamp(0, y_s.shape[-1] - 1)
        nll = softmax.sum_y.log() + (softmax.max_y - y_s.gather(-1, label.unsqueeze(-1)))
        loss = loss + torch.where(rows.labels == label, scalars.hard_weight * nll.squeeze(-1), 0.0)

    if not return_stats:
        return loss, centre
    return (
        loss,
        centre,
        mul_zero_safe(p_s, softmax.sum_s.log() - (z_s - softmax.max_s)).sum(-1),
        mul_zero_safe(p_t, softmax.sum_t.log() - (z_t - softmax.max_t)).sum(-1),
        kl_terms(p_t, -d, -prob_diff).sum(-1),
        kl_terms(p_s, d, prob_diff).sum(-1),
        ((z_s == softmax.max_s) & (z_t == softmax.max_t)).any(-1),
    )


def _gradient(
    rows: _Rows,
    softmax: _SoftmaxParts,
    form: DivergenceForm,
    clips: bool,
    centre: Tensor | None,
    weight: Tensor,
    out: Tensor,  # (n, V), may be rows.student
) -> tuple[()]:
    """Write weight * d(loss) / d(student's projection) to out."""
    scalars = rows.numbers(rows.student.dtype)
    y_s, dlogit_dproj, z_s, z_t = _logits(rows)
    p_s, p_t, d = _distributions(rows, z_s, z_t, softmax)
    if centre is None:
        grad = -stable_prob_diff(p_s, p_t, d)
    elif clips or form not in _BY_KL:
        outcomes = Outcomes(p_s, p_t, d, stable_prob_diff(p_s, p_t, d))
        _, slopes = terms_and_slopes(outcomes, scalars, rows.reverse_weight, form, clips)
        if form is DivergenceForm.TOTAL_VARIATION:
            (by_student, by_teacher), masses = led_parts(p_s, slopes), centre.unsqueeze(-1)
            grad = by_student * masses[:, 1] - by_teacher * masses[:, 0]
        else:
            grad = slopes - mul_zero_safe(p_s, centre.unsqueeze(-1))
    elif form is not DivergenceForm.MIXTURE:
        grad = mul_zero_safe(p_s, -d - centre.unsqueeze(-1))
        if rows.reverse_weight is not None:
            share = rows.reverse_weight.unsqueeze(-1)
            grad = mul_zero_safe(share, grad) - (1 - share) * stable_prob_diff(p_s, p_t, d)
    else:
        u, _ = mixture_log_ratios(d, scalars.teacher_share, scalars.student_share)
        grad = scalars.student_share * mul_zero_safe(p_s, -u - centre.unsqueeze(-1))
    grad = grad * (scalars.inv_temperature * scalars.soft_weight)
    if rows.labels is not None and softmax.sum_y is not None:
        has_label = (rows.labels >= 0).unsqueeze(-1)
        columns = torch.arange(y_s.shape[-1], device=y_s.device)
        one_hot = (columns == rows.labels.unsqueeze(-1)).to(y_s.dtype)
        residual = (y_s - softmax.max_y).exp() / softmax.sum_y - one_hot
        grad = grad + torch.where(has_label, scalars.hard_weight * residual, 0.0)
    out.copy_(grad * dlogit_dproj * weight.unsqueeze(-1))
    return ()


def _logits(rows: _Rows, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y_s, its derivative with respect to the projection, and z_s and z_t, logits over temperature."""
    dtype = dtype or rows.student.dtype
    scalars = rows.numbers(dtype)
    y_s, dlogit_dproj = transform_logits(
        rows.student.to(dtype),
        rows.student_bias,
        scalars.student_logit_scale,
        scalars.student_softcap if rows.student_has_softcap else None,
    )
    y_t, _ = transform_logits(
        rows.teacher.to(dtype),
        rows.teacher_bias,
        scalars.teacher_logit_scale,
        scalars.teacher_softcap if rows.teacher_has_softcap else None,
    )
    return y_s, dlogit_dproj, y_s * scalars.inv_temperature, y_t * scalars.inv_temperature


def _gap_beyond(rows: _Rows, z_s: Tensor, z_t: Tensor, max_s: Tensor, max_t: Tensor) -> Tensor:
    """Return `gap_beyond` of the rows. Where a transform rounds the logits it starts from the projections."""
    if rows.rounds_logits:
        _, _, z_s, z_t = _logits(rows, float64_if_supported(z_s.device))
    return gap_beyond(z_s, z_t, max_s, max_t)


def _distributions(
    rows: _Rows, z_s: Tensor, z_t: Tensor, softmax: _SoftmaxParts
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p_s, p_t and d = log p_t - log p_s."""
    p_s = (z_s - softmax.max_s).exp() / softmax.sum_s
    p_t = (z_t - softmax.max_t).exp() / softmax.sum_t
    return p_s, p_t, _gap_beyond(rows, z_s, z_t, softmax.max_s, softmax.max_t) - softmax.lse_diff
