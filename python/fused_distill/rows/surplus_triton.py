"""The student's surplus rows beside the row kernels of a full-vocabulary teacher.

The kernels of a top-k teacher's tail sum the surplus rows' exponentials and write their gradient. What is
between, a few numbers per row, is computed by PyTorch in float64 and changes the row statistics, so that the
kernels of the compared columns need not know of the surplus rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fused_distill_kernels import JSDKernels, row_statistics, tail_gradient, tail_sums
from torch import Tensor

from ..config import DivergenceForm, LossConfig
from .base import StudentRows, TailStatistics
from .elementwise import exp_sub_max, mul_zero_safe
from .surplus import Surplus

# Of sums of exponentials, whose products must not overflow. Compared columns then have no probability.
_LARGEST_SUM = 1e30


@dataclass(frozen=True)
class TritonSurplus:
    """The surplus rows of a chunk."""

    rows: StudentRows  # logits (n, Vs - V)
    outcome: Surplus
    config: LossConfig

    @classmethod
    def added_to(cls, statistics: Tensor, rows: StudentRows, kernels: JSDKernels) -> TritonSurplus:
        """Return the surplus rows, and make row statistics (n, PART) those of the softmax over all rows."""
        config, field = kernels.config, row_statistics

        def read(column: int) -> Tensor:
            return statistics[:, column].double()

        max_s = read(field.MAX_S.value)
        lse = kernels.factor * max_s + read(field.SUM_S.value).log()
        lse_y = kernels.label_factor * max_s + read(field.SUM_Y.value).log() if kernels.wants_y else lse
        outcome = Surplus.beside(lse, lse_y, _tail_statistics(rows, config))

        rest, log_rest = outcome.log_rest.exp(), outcome.log_rest
        # Maxima remain those of the compared columns, relative to which these keep their digits.
        new = {
            field.SUM_S: (outcome.lse - kernels.factor * max_s).exp().clamp_max(_LARGEST_SUM),
            field.SUM_Y: (outcome.lse_y - kernels.label_factor * max_s).exp().clamp_max(_LARGEST_SUM),
            field.LSE_DIFFERENCE: read(field.LSE_DIFFERENCE.value) + log_rest,
            field.ENTROPY_S: rest * (read(field.ENTROPY_S.value) - log_rest) + outcome.entropy,
            field.FORWARD_KL: read(field.FORWARD_KL.value) - log_rest,
            field.REVERSE_KL: mul_zero_safe(rest, read(field.REVERSE_KL.value) + log_rest)
            + (outcome.mass + outcome.reverse_kl),
            field.TOP: torch.where(outcome.tail.max_z > kernels.factor * max_s, -1.0, read(field.TOP.value)),
        }
        if rows.labels is not None:
            new[field.NLL] = read(field.NLL.value) - (rows.labels >= 0) * outcome.log_rest_y
        for column, values in new.items():
            statistics[:, column.value] = values
        for column in (field.REVERSE_KL, field.ENTROPY_S):
            statistics[:, column.value].clamp_min_(0.0)
        return cls(rows, outcome, config)

    def add_to_sums(self, sums: Tensor) -> None:
        """Add the outcome's terms to the sums of `JSDKernels.sums`, (n, 2 or 3)."""
        outcome, config = self.outcome, self.config
        if config.form is DivergenceForm.TOTAL_VARIATION:
            terms = (outcome.mass, torch.zeros_like(outcome.mass), outcome.mass)
        elif config.form is DivergenceForm.MIXTURE:
            terms = outcome.mixture_kls(config)
        else:
            mixture, (of_student, _) = config.mixture, outcome.mixture_kls(config)
            by_ratio = mixture.imbalance * mixture.teacher_share * outcome.mass
            terms = (mixture.student_weight * of_student + by_ratio, outcome.term(config, None))
        sums += torch.stack(terms, -1)

    def gradient(self, statistics: Tensor, sums: Tensor | None, grad: Tensor, weight: Tensor) -> Tensor:
        """Write weight (n,) times the gradient by the surplus logits to grad (n, Vs - V).

        grad may be those logits.

        Returns:
            The row statistics (n, PART) that the gradient of the compared columns takes.
        """
        rows, outcome, config = self.rows, self.outcome, self.config
        centre = None if sums is None else sums[:, 0]
        if sums is not None and config.form is DivergenceForm.TOTAL_VARIATION:
            centre = sums[:, :2]
        if config.form in (DivergenceForm.REVERSE_KL, DivergenceForm.MIXED_KL):
            statistics = statistics.clone()
            centre = statistics[:, row_statistics.REVERSE_KL.value]
            centre -= outcome.log_teacher_sum
        factor_z, factor_y = outcome.gradient_factors(
            config, centre, weight, rows.labels, rows.reverse_weight
        )
        columns = [outcome.tail.max_z, factor_z]
        if factor_y is not None:
            columns += [outcome.tail.max_y, factor_y]
        factors = torch.stack([*columns, *columns][:4], -1).float()
        tail_gradient(rows.logits, factors, grad, config, bias=rows.bias, want_y=factor_y is not None)
        return statistics


def _tail_statistics(rows: StudentRows, config: LossConfig) -> TailStatistics:
    """Return the log-sum-exp parts of the surplus rows."""
    parts = tail_sums(rows.logits, config, bias=rows.bias, want_y=config.needs_two_softmaxes)
    columns: list[Tensor] = []
    for maxima, others in (parts[:, :2].unbind(1), parts[:, 2:].unbind(1))[: 1 + config.needs_two_softmaxes]:
        top = maxima.amax(-1, keepdim=True)
        # The kernel adds 1 for the maximum itself.
        columns += [top.squeeze(-1), ((1 + others) * exp_sub_max(maxima, top)).sum(-1)]
    return TailStatistics(*[*columns, *columns][:4])
