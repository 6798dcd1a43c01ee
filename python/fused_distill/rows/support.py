"""The K named outcomes of a top-k teacher in float64: logits, divergences over them, statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import DivergenceForm, LossConfig, Scalars
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats
from .base import MIN_TEACHER_TAIL_PROB, RowLoss, StudentRows, TailStatistics, TeacherRows
from .elementwise import log_gap, mixture_log_ratios, mul_zero_safe, transform_logits

# float64 temporaries per named outcome that a row needs at once.
_SUPPORT_TEMPORARIES = 40


class Support(NamedTuple):
    """The K named outcomes in float64; an absent one has probability 0 in both models."""

    is_valid_local: Tensor  # (n, K) bool: present, and its column is on this rank
    y: Tensor  # (n, K) student's logits at temperature 1, -inf where absent
    z: Tensor  # (n, K) y over temperature
    logprobs: Tensor  # (n, K) the teacher's
    reverse_weight: Tensor | None  # (n,)

    @classmethod
    def from_logits(
        cls, y: Tensor, student: StudentRows, teacher: TeacherRows, config: LossConfig
    ) -> Support:
        """Return the support for student's logits y (n, K) at temperature 1."""
        mix = student.reverse_weight
        weight = None if mix is None else mix.to(y.dtype)
        return cls(valid_local(teacher), y, y / config.temperature, teacher.values, weight)

    @property
    def present(self) -> Tensor:
        """(n, K) bool."""
        return self.logprobs != -torch.inf


def support_workspace(k: int) -> Workspace:
    """Return the memory of the K + 1 outcomes' temporaries."""
    return Workspace(per_row=_SUPPORT_TEMPORARIES * 8 * (k + 1))


def student_transform(x: Tensor, bias: Tensor | None, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return the student's logits at temperature 1 from projections x, and their derivative."""
    scalars = Scalars(*config.scalars(x.dtype).unbind())
    softcap = None if config.student_softcap is None else scalars.student_softcap
    return transform_logits(x, bias, scalars.student_logit_scale, softcap)


def valid_local(teacher: TeacherRows) -> Tensor:
    """Return (n, K) bool: entries that are present and whose column is on this rank."""
    present = teacher.values != -torch.inf
    return present if teacher.is_local is None else present & teacher.is_local


def support_logits(
    x: Tensor,  # (n, K) projections
    teacher: TeacherRows,
    config: LossConfig,
    bias: Tensor | None,  # (V,)
) -> tuple[Tensor, Tensor]:
    """Return (n, K) logits at temperature 1, -inf where absent and 0 on another rank, and their derivative.

    The derivative is (n, K) or 0-d, and valid where the column is local.
    """
    assert teacher.ids is not None
    dtype = teacher.values.dtype
    y, dlogit_dproj = student_transform(
        x.to(dtype), None if bias is None else bias[teacher.ids].to(dtype), config
    )
    y = torch.where(teacher.values != -torch.inf, y, -torch.inf)
    return y if teacher.is_local is None else torch.where(teacher.is_local, y, 0.0), dlogit_dproj


def local_gradient(
    grad_support: Tensor, dlogit_dproj: Tensor, teacher: TeacherRows, dtype: torch.dtype
) -> Tensor:
    """Return the (n, K) gradient with respect to the projections of this rank's columns."""
    grad_support = (grad_support * dlogit_dproj).to(dtype)
    return grad_support if teacher.is_local is None else torch.where(teacher.is_local, grad_support, 0.0)


def log_normalizer_of(named: Tensor, tail_max: Tensor, tail_sum: Tensor) -> Tensor:
    """Return the (n,) log-sum-exp of the K named logits and the tail."""
    return torch.logaddexp(named.logsumexp(-1), tail_max + tail_sum.log())


def bucketed(
    support: Support, tail: TailStatistics, config: LossConfig, outcomes: RowLoss
) -> tuple[Tensor, Tensor, Tensor, DistillStats | None]:
    """Return the divergence over K + 1 outcomes and its gradients by z (n, K) and the tail's logit (n,)."""
    named = support.logprobs.exp().sum(-1)
    tail_t = torch.where(tail.sum_z == 0, 0.0, (1 - named).clamp_min(MIN_TEACHER_TAIL_PROB))
    z = torch.cat([support.z, (tail.max_z + tail.sum_z.log()).unsqueeze(-1)], -1)
    logprobs = torch.cat([support.logprobs, tail_t.log().unsqueeze(-1)], -1)
    loss, grad, stats = _outcome_divergence(z, logprobs, support.reverse_weight, config, outcomes)
    k = support.z.shape[-1]
    return loss, grad[:, :k], grad[:, k], stats


def renormalized(
    support: Support, config: LossConfig, outcomes: RowLoss
) -> tuple[Tensor, Tensor, DistillStats | None]:
    """Return the divergence over K outcomes and its gradient by z (n, K)."""
    z, logprobs = support.z, support.logprobs
    # A row without entries, or whose entries the student forbids, has one outcome for both models.
    only_outcome = torch.zeros_like(support.present)
    only_outcome[:, 0] = (z == -torch.inf).all(-1)
    logprobs = logprobs.masked_fill(only_outcome.any(-1, keepdim=True), -torch.inf)
    z, logprobs = z.masked_fill(only_outcome, 0.0), logprobs.masked_fill(only_outcome, 0.0)
    return _outcome_divergence(z, logprobs, support.reverse_weight, config, outcomes)


def _outcome_divergence(
    z: Tensor, logprobs: Tensor, reverse_weight: Tensor | None, config: LossConfig, row_loss: RowLoss
) -> tuple[Tensor, Tensor, DistillStats | None]:
    """Return the divergence of each row's few outcomes, and its gradient by z. z is overwritten."""
    grad = torch.empty_like(z)
    config = LossConfig(
        divergence=config.divergence,
        beta=config.beta,
        alpha=config.alpha,
        entry_clip=config.entry_clip,
        return_stats=config.return_stats,
    )
    rows = StudentRows(z, torch.ones_like(z[:, 0]), reverse_weight=reverse_weight)
    teacher, group = TeacherRows(logprobs), ShardGroup()
    loss, stats = row_loss(rows, teacher, config, grad=grad, group=group, block_rows=None)
    return loss, grad, stats


def truncated(
    support: Support, tail: TailStatistics, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor, DistillStats | None]:
    """Return plain sums over the support and their gradients by z (n, K) and the tail's logit (n,)."""
    log_normalizer = log_normalizer_of(support.z, tail.max_z, tail.sum_z)
    log_s, log_t = support.z - log_normalizer.unsqueeze(-1), support.logprobs
    scalars = Scalars(*config.scalars(log_s.dtype).unbind())
    beta, one_minus_beta = scalars.teacher_share, scalars.student_share
    p_s, p_t, d = log_s.exp(), log_t.exp(), log_gap(log_s, log_t)
    forward, reverse = mul_zero_safe(p_t, d).sum(-1), mul_zero_safe(p_s, -d).sum(-1)
    if config.form is DivergenceForm.FORWARD_KL:
        loss, grad_logp = forward, -p_t
    elif config.form is DivergenceForm.REVERSE_KL:
        loss, grad_logp = reverse, mul_zero_safe(p_s, 1 - d)
    else:
        u, v = mixture_log_ratios(d, beta, one_minus_beta)
        loss = -beta * mul_zero_safe(p_t, v).sum(-1) - one_minus_beta * mul_zero_safe(p_s, u).sum(-1)
        grad_logp = one_minus_beta * mul_zero_safe(p_s, -u)
    stats = None
    if config.return_stats:
        entropies = (mul_zero_safe(p_s, -log_s).sum(-1), mul_zero_safe(p_t, -log_t).sum(-1))
        stats = DistillStats(*entropies, forward, reverse, torch.zeros_like(loss, dtype=torch.bool))
    total = grad_logp.sum(-1)
    grad_support = grad_logp - log_s.exp() * total.unsqueeze(-1)
    grad_tail = -total * tail.sum_z * (tail.max_z - log_normalizer).exp()
    return loss, grad_support, grad_tail, stats


def with_masses(stats: DistillStats, support: Support, tail: TailStatistics | None) -> DistillStats:
    """Add top-1 agreement and both models' mass on the support to the statistics."""
    max_s, max_t = support.z.amax(-1, keepdim=True), support.logprobs.amax(-1, keepdim=True)
    student_mass = None
    if tail is not None:
        max_s = torch.maximum(max_s, tail.max_z.unsqueeze(-1))
        log_normalizer = log_normalizer_of(support.z, tail.max_z, tail.sum_z)
        student_mass = (support.z.logsumexp(-1) - log_normalizer).exp()
    top1_match = (support.z == max_s) & (support.logprobs == max_t) & support.present
    return stats._replace(
        top1_agreement=top1_match.any(-1),
        student_mass=student_mass,
        teacher_mass=support.logprobs.exp().sum(-1),
    )
