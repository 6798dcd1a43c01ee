"""Row loss for a full-vocabulary teacher by Triton kernels, and a few operations on one number per row."""

from __future__ import annotations

from functools import partial

import torch
from fused_distill_kernels import jsd_rows
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import Divergence, LossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import StudentRows, TeacherRows
from .elementwise import exp_sub_max


def kernel_workspace(n_columns: int) -> Workspace:
    """Return a bound on the kernels' partial sums and their reductions: 85 bytes per tile of 2048 columns."""
    return Workspace(per_row=n_columns // 24 + 64)


class TritonJSD:
    """The generalized JSD of each row, by kernels that compute in float32."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the tiles' partial sums."""
        del dtype
        return kernel_workspace(n_columns)

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
        on_statistics = on_sums = None
        if group is not None and group.process_group is not None:
            on_statistics = partial(_reduce_statistics, group, student.labels is not None)
            on_sums = partial(_reduce_sums, group)
        sums = jsd_rows(
            student.logits,
            teacher.values,
            student.grad_weight,
            config,
            student_bias=student.bias,
            teacher_bias=teacher.bias,
            labels=student.labels,
            grad=grad,
            on_statistics=on_statistics,
            on_sums=on_sums,
        )
        kl_student, kl_teacher, nll, *stats, top1_match = sums.unbind(-1)
        if config.divergence is Divergence.FORWARD_KL:
            soft = kl_teacher
        elif config.divergence is Divergence.REVERSE_KL:
            soft = kl_student
        else:
            soft = config.beta * kl_teacher + config.one_minus_beta * kl_student
        loss = student.weight * (config.soft_weight * soft + config.hard_weight * nll)
        if not config.return_stats:
            return RowResult(loss, None)
        return RowResult(loss, DistillStats(*stats, top1_agreement=top1_match > 0))


# The next two functions store the ranks' total in a row's first tile and clear its other tiles. The next
# launch adds up all tiles of the row, and so reads that total.


def _reduce_statistics(group: ShardGroup, has_labels: bool, table: Tensor) -> None:
    """All-reduce the table (n, 7, tiles) of log-sum-exp parts; the label's softmax only if there is one."""
    max_s, sum_s, max_t, sum_t, diffs, max_y, sum_y = table.unbind(1)
    maxima = [max_s, max_t, max_y] if has_labels else [max_s, max_t]
    max_logits = group.all_reduce_max(*(tile.amax(-1, keepdim=True) for tile in maxima))
    larger = torch.maximum(max_logits[0], max_logits[1])
    parts = [(sum_s, max_s, max_logits[0]), (sum_t, max_t, max_logits[1])]
    parts += [(diffs, torch.maximum(max_s, max_t), larger)]
    if has_labels:
        parts += [(sum_y, max_y, max_logits[2])]
    sums = group.all_reduce_sum(*((part * exp_sub_max(tile, m)).sum(-1) for part, tile, m in parts))
    for column, max_logit in zip(maxima, max_logits, strict=True):
        column.fill_(-torch.inf)[:, :1] = max_logit
    for (column, *_), total in zip(parts, sums, strict=True):
        column.zero_()[:, 0] = total


def _reduce_sums(group: ShardGroup, table: Tensor) -> None:
    """All-reduce the table (n, 8, tiles) of the divergence's sums."""
    (total,) = group.all_reduce_sum(table.sum(-1))
    table.zero_()[:, :, 0] = total
