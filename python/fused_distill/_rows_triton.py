"""The row step of the Triton backend: kernel launches, then a few operations on one number per row."""

from __future__ import annotations

from dataclasses import asdict

from fused_distill_kernels import jsd_rows
from torch import Tensor

from ._settings import DistillStats, LossSettings, RowResult
from ._teachers import TeacherRows


def row_divergence(
    student_logits: Tensor,  # (n, V) float32
    teacher: TeacherRows,  # (n, V) float32
    weight: Tensor,  # (n,) float32, contiguous
    settings: LossSettings,
    *,
    student_bias: Tensor | None = None,
    labels: Tensor | None = None,
    grad: Tensor | None = None,
    return_stats: bool = False,
    block_rows: int | None = None,
) -> RowResult:
    """`_rows.row_divergence` by the kernels; block_rows is not needed."""
    del block_rows
    sums = jsd_rows(
        student_logits,
        teacher.values,
        weight,
        **asdict(settings),
        student_bias=student_bias,
        teacher_bias=teacher.bias,
        labels=labels if settings.hard_weight != 0 else None,
        grad=grad,
        return_stats=return_stats,
    )
    kl_student, kl_teacher, surprise, entropy_s, entropy_t, forward_kl, reverse_kl, shared_top = sums.unbind(
        -1
    )
    if settings.beta == 0:
        soft = kl_teacher
    elif settings.beta == 1:
        soft = kl_student
    else:
        soft = settings.beta * kl_teacher + (1 - settings.beta) * kl_student
    loss = weight * (settings.soft_weight * soft + settings.hard_weight * surprise)
    stats = (
        DistillStats(entropy_s, entropy_t, forward_kl, reverse_kl, shared_top > 0) if return_stats else None
    )
    return RowResult(loss, stats)
