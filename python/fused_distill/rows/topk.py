"""Row losses for a top-k teacher without Triton: K named outcomes, and the tail, the rest of the vocabulary.

The K columns are taken out of the student's logits and set to -inf, so that one pass over the row gives the
sum of the tail's exponentials directly, not as a difference of two nearly equal masses. The K + 1 numbers per
row that follow are computed in float64, so that close models keep their digits: a log-probability minus a
logit is not exact in float32, as the difference of two close logits is.

The gradient is one scalar times the softmax of the tail, written in a second pass, plus K corrections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunked.gemm import float64_if_supported
from ..chunked.workspace import Workspace
from ..config import LossConfig, TopKLossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import RowLoss, StudentRows, TailStatistics, TeacherRows
from .elementwise import exp_sub_max
from .support import (
    Support,
    bucketed,
    local_gradient,
    log_normalizer_of,
    renormalized,
    student_transform,
    support_logits,
    support_workspace,
    truncated,
    valid_local,
    with_masses,
)
from .tail_cpp import CppTail
from .tail_torch import TorchTail


@dataclass(frozen=True)
class SupportRowLoss:
    """The loss of tail="renormalize" on the student's logits at the K ids alone."""

    k: int
    outcomes: RowLoss  # the divergence of few outcomes

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the K outcomes in float64."""
        del n_columns, dtype
        return support_workspace(self.k)

    def __call__(
        self,
        student: StudentRows,  # logits (n, K)
        teacher: TeacherRows,
        config: LossConfig,
        *,
        grad: Tensor | None,
        group: ShardGroup,
        block_rows: int | None,
    ) -> RowResult:
        """Return losses and statistics; see `RowLoss`."""
        del block_rows
        y, dlogit_dproj = support_logits(student.logits, teacher, config, student.bias)
        (y,) = group.all_reduce_sum(y)
        support = Support.from_logits(y, student, teacher, config)
        soft, grad_support, stats = renormalized(support, config, self.outcomes)
        if stats is not None:
            stats = _in_dtype(with_masses(stats, support, None), student.logits.dtype)
            student = student.weighted(stats)
        weight = student.weight.to(y.dtype)
        if grad is not None:
            scale = student.grad_weight.to(y.dtype) * (config.soft_weight / config.temperature)
            grad.copy_(local_gradient(grad_support * scale.unsqueeze(-1), dlogit_dproj, teacher, grad.dtype))
        return RowResult((weight * (config.soft_weight * soft)).to(student.logits.dtype), stats)


@dataclass(frozen=True)
class TailRowLoss:
    """The loss of any tail option on the student's logits of the whole vocabulary."""

    k: int
    outcomes: RowLoss  # the divergence of few outcomes
    passes: TorchTail | CppTail

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the K + 1 outcomes in float64 and of the passes over the tail."""
        return support_workspace(self.k) + self.passes.workspace(n_columns, dtype)

    def __call__(
        self,
        student: StudentRows,  # logits (n, V) are overwritten
        teacher: TeacherRows,
        config: LossConfig,
        *,
        grad: Tensor | None,
        group: ShardGroup,
        block_rows: int | None,
    ) -> RowResult:
        """Return losses and statistics; see `RowLoss`."""
        assert teacher.ids is not None
        assert isinstance(config, TopKLossConfig)
        logits, bias, ids = student.logits, student.bias, teacher.ids
        y, dlogit_dproj = support_logits(logits.gather(-1, ids), teacher, config, bias)
        label = None if student.labels is None else _Label.read(logits, student.labels, config, bias)
        _exclude_support(logits, teacher)
        tail = self.passes.statistics(logits, bias, config, block_rows=block_rows)
        y, label, tail = _over_ranks(group, y, label, tail)
        support = Support.from_logits(y, student, teacher, config)

        if config.tail == "renormalize":
            soft, grad_support, stats = renormalized(support, config, self.outcomes)
            grad_tail = torch.zeros_like(soft)
        elif config.tail == "bucket":
            soft, grad_support, grad_tail, stats = bucketed(support, tail, config, self.outcomes)
        else:
            soft, grad_support, grad_tail, stats = truncated(support, tail, config)
        if stats is not None:
            stats = _in_dtype(with_masses(stats, support, tail), student.logits.dtype)
            student = student.weighted(stats)
        weight = student.weight.to(y.dtype)
        loss = config.soft_weight * soft
        grad_weight = student.grad_weight.to(y.dtype)
        scale = grad_weight * (config.soft_weight / config.temperature)
        grad_support, grad_tail = grad_support * scale.unsqueeze(-1), grad_tail * scale
        hard = None
        if label is not None:
            hard = _HardLoss.compute(label, support, ids, tail, grad_weight, config.hard_weight)
            loss, grad_support = loss + hard.loss, grad_support + hard.grad_support

        if grad is not None:
            grad_support = local_gradient(grad_support, dlogit_dproj, teacher, grad.dtype)
            factor_z = torch.where(tail.sum_z == 0, 0.0, grad_tail / tail.sum_z)
            factor_y = None if hard is None else hard.factor_y
            self.passes.gradient(logits, bias, config, tail, factor_z, factor_y, grad, block_rows=block_rows)
            if label is not None and hard is not None:
                label.write_gradient(hard, factor_z, tail.max_z, config.temperature, grad)
            grad.scatter_add_(-1, ids, grad_support)
        return RowResult((weight * loss).to(logits.dtype), stats)


class _Label(NamedTuple):
    """The label's column of each row, read before any column is excluded."""

    column: Tensor  # (n, 1), arbitrary where the label is on another rank
    present: Tensor  # (n,) bool
    is_local: Tensor  # (n,) bool
    y: Tensor  # (n,) float64 logit at temperature 1
    dlogit_dproj: Tensor  # (n,) or 0-d, valid where is_local

    @classmethod
    def read(cls, logits: Tensor, labels: Tensor, config: LossConfig, bias: Tensor | None) -> _Label:
        column, dtype = labels.clamp(0, logits.shape[-1] - 1), float64_if_supported(logits.device)
        is_local = labels == column
        x = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(dtype)
        y, dlogit_dproj = student_transform(x, None if bias is None else bias[column].to(dtype), config)
        return cls(column.unsqueeze(-1), labels >= 0, is_local, torch.where(is_local, y, 0.0), dlogit_dproj)

    def write_gradient(
        self, hard: _HardLoss, factor_z: Tensor, max_z: Tensor, temperature: float, grad: Tensor
    ) -> None:
        """Write the label's whole entry where it lies in the tail: p - 1 has no digits in half precision."""
        soft = factor_z * (self.y / temperature - max_z).exp()
        entry = ((soft + hard.grad_label) * self.dlogit_dproj).to(grad.dtype).unsqueeze(-1)
        in_tail = (self.is_local & ~hard.label_in_support).unsqueeze(-1)
        grad.scatter_(-1, self.column, torch.where(in_tail, entry, grad.gather(-1, self.column)))


class _HardLoss(NamedTuple):
    """The cross entropy with the label over the whole vocabulary, and its gradients with respect to y."""

    loss: Tensor  # (n,) times hard_weight, without the row's weight
    grad_support: Tensor  # (n, K)
    factor_y: Tensor  # (n,) factor of e^(y - max_y) in the tail
    grad_label: Tensor  # (n,)
    label_in_support: Tensor  # (n,) bool

    @classmethod
    def compute(
        cls,
        label: _Label,
        support: Support,
        ids: Tensor,
        tail: TailStatistics,
        grad_weight: Tensor,  # (n,) float64
        hard_weight: float,
    ) -> _HardLoss:
        log_normalizer = log_normalizer_of(support.y, tail.max_y, tail.sum_y)
        log_p = label.y - log_normalizer
        weight = grad_weight * hard_weight * label.present
        at_label = (ids == label.column) & support.is_valid_local & label.is_local.unsqueeze(-1)
        p_support = (support.y - log_normalizer.unsqueeze(-1)).exp()
        return cls(
            torch.where(label.present, -hard_weight * log_p, 0.0),
            weight.unsqueeze(-1) * (p_support - at_label.to(p_support.dtype)),
            weight * (tail.max_y - log_normalizer).exp(),
            weight * log_p.expm1(),
            at_label.any(-1),
        )


def _over_ranks(
    group: ShardGroup, y: Tensor, label: _Label | None, tail: TailStatistics
) -> tuple[Tensor, _Label | None, TailStatistics]:
    """Combine the ranks' logits of support and label and their tails."""
    if group.process_group is None:
        return y, label, tail
    max_z, max_y = group.all_reduce_max(tail.max_z, tail.max_y)
    y, label_y, sum_z, sum_y = group.all_reduce_sum(
        y,
        None if label is None else label.y,
        tail.sum_z * exp_sub_max(tail.max_z, max_z),
        tail.sum_y * exp_sub_max(tail.max_y, max_y),
    )
    label = None if label is None else label._replace(y=label_y)
    return y, label, TailStatistics(max_z, sum_z, max_y, sum_y)


def _exclude_support(logits: Tensor, teacher: TeacherRows) -> None:
    """Write -inf to the columns of the support. Absent entries, whose ids are arbitrary, change nothing."""
    assert teacher.ids is not None
    marks = torch.where(valid_local(teacher), -torch.inf, torch.inf).to(logits.dtype)
    logits.scatter_reduce_(-1, teacher.ids, marks, "amin")


def _in_dtype(stats: DistillStats, dtype: torch.dtype) -> DistillStats:
    return stats.map(lambda c: c if c.dtype == torch.bool else c.to(dtype))
