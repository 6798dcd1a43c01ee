"""Row loss for a full-vocabulary teacher by Triton kernels."""

from __future__ import annotations

import torch
from fused_distill_kernels import JSDKernels, row_statistics
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import DivergenceForm, LossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import StudentRows, TeacherRows
from .elementwise import mul_zero_safe
from .surplus_triton import TritonSurplus


class TritonJSD:
    """The divergence of each row, by kernels that compute in float32."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of a row's parts, 64 bytes each, and of operations on one number per row."""
        del n_columns, dtype
        return Workspace(per_row=1024)

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
        del block_rows
        group = group or ShardGroup()
        n_columns, surplus_rows, surplus = teacher.values.shape[1], None, None
        if student.logits.shape[1] > n_columns:
            student, surplus_rows = student.split(n_columns)
        kernels = JSDKernels(
            student.logits,
            teacher.values,
            student.bias,
            teacher.bias,
            student.labels,
            config,
            student.reverse_weight,
        )
        statistics = kernels.statistics()
        if group.process_group is not None:
            statistics = kernels.merge(group.all_gather(statistics))
        if surplus_rows is not None:
            surplus = TritonSurplus.added_to(statistics, surplus_rows, kernels)
        sums = None
        if kernels.needs_sums:
            (sums,) = group.all_reduce_sum(kernels.sums(statistics))
            if surplus is not None:
                surplus.add_to_sums(sums)
        soft = _soft_loss(statistics, sums, student.reverse_weight, config)
        stats = _stats(statistics) if config.return_stats else None
        student = student.weighted(stats)
        if grad is not None:
            for_gradient = statistics
            if surplus is not None:
                for_gradient = surplus.gradient(statistics, sums, grad[:, n_columns:], student.grad_weight)
            kernels.gradient(for_gradient, sums, student.grad_weight, grad[:, :n_columns])
        loss = config.soft_weight * soft
        if student.labels is not None:
            loss = torch.add(loss, statistics[:, row_statistics.NLL.value], alpha=config.hard_weight)
        return RowResult(loss * student.weight, stats)


def _soft_loss(
    statistics: Tensor,  # (n, PART)
    sums: Tensor | None,  # (n, 2 or 3) of `JSDKernels.sums`
    reverse_weight: Tensor | None,  # (n,)
    config: LossConfig,
) -> Tensor:
    """Return the divergences of n rows."""
    if sums is not None:
        if config.form is not DivergenceForm.MIXTURE or config.entry_clip is not None:
            return sums[:, -1]
        return torch.add(config.mixture.student_share * sums[:, 0], sums[:, 1], alpha=config.beta)
    forward = statistics[:, row_statistics.FORWARD_KL.value]
    reverse = statistics[:, row_statistics.REVERSE_KL.value]
    if reverse_weight is None:
        return forward if config.form is DivergenceForm.FORWARD_KL else reverse
    return mul_zero_safe(1 - reverse_weight, forward) + mul_zero_safe(reverse_weight, reverse)


def _stats(statistics: Tensor) -> DistillStats:
    fields = (
        row_statistics.ENTROPY_S,
        row_statistics.ENTROPY_T,
        row_statistics.FORWARD_KL,
        row_statistics.REVERSE_KL,
    )
    columns = (statistics[:, field.value] for field in fields)
    return DistillStats(*columns, top1_agreement=statistics[:, row_statistics.TOP.value] == 0)
