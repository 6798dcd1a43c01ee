"""The student's surplus rows, those from vocab_size on, as one outcome beside the compared tokens.

The sums over the compared tokens have the terms of `elementwise`, with the student's softmax over all rows. P
is the student's probability of all surplus rows together, and e = 1e-7. The outcome adds

    P                                to forward KL and, times (1 - c), to KL(p_t || m), because p_t is 0
    P (-c - log(1 - c))              to KL(p_s || m), because m = (1 - c) p_s
    P log(P / e) - P + log(1 + e)    to reverse KL, where the teacher has (p_t, e) / (1 + e)
    P / 2                            to the total variation
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DivergenceForm, LossConfig
from .base import MIN_TEACHER_TAIL_PROB, TailStatistics
from .elementwise import mul_zero_safe

_REVERSE_KL = (DivergenceForm.REVERSE_KL, DivergenceForm.MIXED_KL)  # or a share of it


class Surplus(NamedTuple):
    """The outcome in each of n rows, (n,) each, in float64 where the device has it."""

    tail: TailStatistics  # of the surplus rows
    lse: Tensor  # log-sum-exp of the student's whole row
    lse_y: Tensor  # the same at temperature 1
    mass: Tensor  # the student's probability of the surplus rows, P above
    log_rest: Tensor  # log(1 - mass)
    log_rest_y: Tensor  # the same at temperature 1

    @classmethod
    def beside(cls, lse: Tensor, lse_y: Tensor, tail: TailStatistics) -> Surplus:
        """Return the outcome beside the compared tokens, whose log-sum-exps are given, (n,) each."""
        log_odds = tail.max_z + tail.sum_z.log() - lse
        log_odds_y = tail.max_y + tail.sum_y.log() - lse_y
        log_rest, log_rest_y = F.logsigmoid(-log_odds), F.logsigmoid(-log_odds_y)
        return cls(tail, lse - log_rest, lse_y - log_rest_y, log_odds.sigmoid(), log_rest, log_rest_y)

    def softmax_parts(self, max_z: Tensor, max_y: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return maximum and sum over the student's whole row, given the compared tokens' maxima.

        The first pair is of the logits over temperature, the second of those at temperature 1.
        """
        maxima = torch.maximum(max_z, self.tail.max_z), torch.maximum(max_y, self.tail.max_y)
        return tuple(
            (top, (lse - top).exp()) for top, lse in zip(maxima, (self.lse, self.lse_y), strict=True)
        )

    @property
    def entropy(self) -> Tensor:
        """Return the outcome's term of the student's entropy."""
        return mul_zero_safe(self.mass, -self.mass.log())

    @property
    def log_teacher_sum(self) -> Tensor:
        """Return log(1 + e), or 0 where the student has no probability of the surplus rows."""
        return (self.mass != 0) * math.log1p(MIN_TEACHER_TAIL_PROB)

    @property
    def reverse_kl(self) -> Tensor:
        """Return the outcome's term of reverse KL. That of forward KL is `mass`."""
        return mul_zero_safe(self.mass, self._log_ratio) - self.mass + self.log_teacher_sum

    def mixture_kls(self, config: LossConfig) -> tuple[Tensor, Tensor]:
        """Return the outcome's terms of KL(p_s || m) and KL(p_t || m)."""
        mixture = config.mixture
        of_student = -mixture.teacher_share - mixture.log_student_share
        return self.mass * of_student, self.mass * mixture.student_share

    def term(self, config: LossConfig, reverse_weight: Tensor | None) -> Tensor:
        """Return the outcome's term of the divergence."""
        if config.form is DivergenceForm.FORWARD_KL:
            return self.mass
        if config.form is DivergenceForm.REVERSE_KL:
            return self.reverse_kl
        if config.form is DivergenceForm.TOTAL_VARIATION:
            return 0.5 * self.mass
        if reverse_weight is not None:
            return (1 - reverse_weight) * self.mass + mul_zero_safe(reverse_weight, self.reverse_kl)
        of_student, of_teacher = self.mixture_kls(config)
        return config.mixture.teacher_weight * of_teacher + config.mixture.student_weight * of_student

    def added_to(
        self,
        loss: Tensor,  # (n,)
        centre: Tensor | None,  # (n,) or (n, 2), what the gradient of the compared columns subtracts
        stats: list[Tensor],  # the first five columns of `DistillStats`, or none
        config: LossConfig,
        reverse_weight: Tensor | None,  # (n,)
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return sums over the compared tokens with this outcome's terms.

        The result for centre is what the gradient takes, which is for reverse KL, also in "mixed_kl", the
        divergence less log(1 + e).
        """

        def plus(column: Tensor, term: Tensor) -> Tensor:
            return (column.to(term.dtype) + term).clamp_min(0.0).to(column.dtype)

        if centre is not None:
            if config.form in _REVERSE_KL:
                centre = centre + (self.reverse_kl - self.log_teacher_sum).to(centre.dtype)
            elif config.form is DivergenceForm.MIXTURE:
                centre = plus(centre, self.mixture_kls(config)[0])
            elif config.form is DivergenceForm.TOTAL_VARIATION:
                centre = centre + torch.stack([self.mass, torch.zeros_like(self.mass)], -1).to(centre.dtype)
            else:
                centre = centre + self._mixture_slope(config).to(centre.dtype)
        if stats:
            entropy, teacher_entropy, forward_kl, reverse_kl, agreement = stats
            forward_kl, reverse_kl = plus(forward_kl, self.mass), plus(reverse_kl, self.reverse_kl)
            stats = [plus(entropy, self.entropy), teacher_entropy, forward_kl, reverse_kl, agreement]
        return plus(loss, config.soft_weight * self.term(config, reverse_weight)), centre, stats

    def gradient_factors(
        self,
        config: LossConfig,
        centre: Tensor | None,  # (n,) or (n, 2), what the gradient of the compared columns subtracts
        weight: Tensor,  # (n,) factor of each row's gradient
        labels: Tensor | None,  # (n,) int64
        reverse_weight: Tensor | None,  # (n,)
    ) -> tuple[Tensor, Tensor | None]:
        """Return the factors of e^(z - max_z) and e^(y - max_y) in the gradient by the surplus logits, (n,).

        centre is KL(p_s || m) for a mixture of "jsd", and the divergence less log(1 + e) for reverse KL, also
        in "mixed_kl". For the total variation it has the sums of `divergences.led_parts`, (n, 2).
        """
        if centre is None:
            by_outcome = self.mass
        elif config.form in _REVERSE_KL:
            by_outcome = mul_zero_safe(self.mass, self._log_ratio - centre)
            if reverse_weight is not None:
                by_outcome = (1 - reverse_weight) * self.mass + mul_zero_safe(reverse_weight, by_outcome)
        elif config.form is DivergenceForm.TOTAL_VARIATION:
            by_outcome = self.mass * centre[:, 1]
        else:
            factor = config.mixture.student_weight if config.form is DivergenceForm.MIXTURE else 1.0
            by_outcome = self._mixture_slope(config) - self.mass * (factor * centre)
        by_outcome = by_outcome * weight * (config.soft_weight / config.temperature)
        factor_z = torch.where(self.tail.sum_z == 0, 0.0, by_outcome / self.tail.sum_z)
        if labels is None:
            return factor_z, None
        return factor_z, weight * (labels >= 0) * config.hard_weight * (self.tail.max_y - self.lse_y).exp()

    @property
    def _log_ratio(self) -> Tensor:
        return (self.mass / MIN_TEACHER_TAIL_PROB).log()

    def _mixture_slope(self, config: LossConfig) -> Tensor:
        """Return the outcome's `divergences.slope` for a mixture."""
        mixture = config.mixture
        return self.mass * (mixture.imbalance - mixture.student_weight * mixture.log_student_share)
