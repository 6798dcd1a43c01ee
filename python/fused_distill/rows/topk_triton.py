"""Row losses for a top-k teacher by Triton kernels, in two to five launches per chunk.

The steps are those of `topk`: take the support's logits out of the rows, one pass over the tail, the K + 1
outcomes, the tail's gradient, and the support's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from fused_distill_kernels import put_support, support_loss, tail_gradient, tail_sums, take_support
from fused_distill_kernels.support import SupportLoss
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import LossConfig, TopKLossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import StudentRows, TeacherRows
from .elementwise import exp_sub_max


@dataclass(frozen=True)
class TritonSupportRowLoss:
    """The loss of tail="renormalize" on the student's logits at the K ids alone."""

    k: int

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the support's float64 logits, and of a few numbers per row."""
        del n_columns, dtype
        return _support_workspace(self.k)

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
        assert isinstance(config, TopKLossConfig)
        columns, logprobs = _columns(teacher), teacher.values
        y, _ = take_support(
            student.logits, columns, logprobs, config, bias=student.bias, labels=None, gather=False
        )
        (y,) = group.all_reduce_sum(y)
        outcomes = _Outcomes(y, logprobs, columns, config)
        return _row_result(outcomes.loss(student, grad), has_tail=False)


@dataclass(frozen=True)
class TritonTailRowLoss:
    """The loss of any tail option on the student's logits of the whole vocabulary."""

    k: int

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the support's float64 logits and gradient, and of a few numbers per row."""
        del n_columns
        return _support_workspace(self.k) + Workspace(per_row=self.k * dtype.itemsize)

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
        del block_rows
        assert isinstance(config, TopKLossConfig)
        logits, bias, labels = student.logits, student.bias, student.labels
        columns, logprobs = _columns(teacher), teacher.values
        y, label_y = take_support(logits, columns, logprobs, config, bias=bias, labels=labels, gather=True)
        tail = tail_sums(logits, config, bias=bias, want_y=config.needs_two_softmaxes)
        if group.process_group is not None:
            y, label_y, tail = _over_ranks(group, y, label_y, tail, config.needs_two_softmaxes)
        support_grad = None if grad is None else grad.new_empty(columns.shape)
        result = _Outcomes(y, logprobs, columns, config, tail, labels, label_y).loss(student, support_grad)
        if grad is not None and support_grad is not None and result.factors is not None:
            tail_gradient(logits, result.factors, grad, config, bias=bias, want_y=labels is not None)
            put_support(grad, columns, support_grad, labels=labels, label_grad=result.label_grad)
        return _row_result(result, has_tail=True)


class _Outcomes(NamedTuple):
    """What `support_loss` reads of a chunk of n rows, besides their weights."""

    y: Tensor  # (n, K) float64
    logprobs: Tensor  # (n, K)
    columns: Tensor  # (n, K) int64
    config: TopKLossConfig
    tail: Tensor | None = None  # (n, 4, n_parts) float64; None: the tail does not count
    labels: Tensor | None = None  # (n,) int64
    label_y: Tensor | None = None  # (n,) float64

    def loss(self, student: StudentRows, grad: Tensor | None) -> SupportLoss:
        """Return losses and statistics, and write the support's gradient to grad (n, K).

        Weights that depend on the statistics take another launch, which computes those.
        """
        if student.weigh is not None:
            unweighted = self._launch(student, None)
            student = student.weighted(_row_result(unweighted, has_tail=self.tail is not None).stats)
        return self._launch(student, grad)

    def _launch(self, student: StudentRows, grad: Tensor | None) -> SupportLoss:
        return support_loss(
            self.y,
            self.logprobs,
            self.columns,
            student.weight,
            self.config,
            grad_weight=student.grad_weight,
            tail=self.tail,
            labels=self.labels,
            label_y=self.label_y,
            reverse_weight=student.reverse_weight,
            grad=grad,
        )


def _support_workspace(k: int) -> Workspace:
    return Workspace(per_row=8 * k + 512)


def _columns(teacher: TeacherRows) -> Tensor:
    """Return the columns (n, K); a negative one is absent or on another rank."""
    assert teacher.ids is not None
    assert teacher.is_local is None
    return teacher.ids.contiguous()


def _over_ranks(
    group: ShardGroup, y: Tensor, label_y: Tensor | None, parts: Tensor, has_two_softmaxes: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Combine the ranks' logits of support and label, and all parts (n, 4, parts) of their tails to one."""
    pairs = [parts[:, :2], parts[:, 2:]] if has_two_softmaxes else [parts[:, :2]]
    maxima = group.all_reduce_max(*(pair[:, 0].amax(-1, keepdim=True) for pair in pairs))
    y, label_y, *sums = group.all_reduce_sum(
        y,
        label_y,
        *(
            ((1 + pair[:, 1]) * exp_sub_max(pair[:, 0], top)).sum(-1, keepdim=True)
            for pair, top in zip(pairs, maxima, strict=True)
        ),
    )
    # The kernel adds 1 for the maximum itself.
    columns = [column for top, total in zip(maxima, sums, strict=True) for column in (top, total - 1)]
    return y, label_y, torch.stack([*columns, *columns][:4], 1)


def _row_result(result: SupportLoss, *, has_tail: bool) -> RowResult:
    if result.stats is None:
        return RowResult(result.loss, None)
    stats = DistillStats(*result.stats.unbind(-1))
    student_mass = stats.student_mass if has_tail else None
    stats = stats._replace(top1_agreement=stats.top1_agreement > 0, student_mass=student_mass)
    return RowResult(result.loss, stats)
