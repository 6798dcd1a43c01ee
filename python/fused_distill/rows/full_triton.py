"""The row step of the Triton backend: kernel launches, then a few operations on one number per row."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch
from fused_distill_kernels import jsd_rows
from torch import Tensor

from ..chunked.teacher import TeacherRows
from ..config import LossSettings
from ..parallel.vocab_shard import Vocabulary
from ..stats import DistillStats, RowResult
from .topk import exp_below


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
    vocabulary: Vocabulary | None = None,
) -> RowResult:
    """`_rows.row_divergence` by the kernels; block_rows is not needed."""
    del block_rows
    labels = labels if settings.hard_weight != 0 else None
    ranks = None if vocabulary is None or vocabulary.group is None else vocabulary
    sums = jsd_rows(
        student_logits,
        teacher.values,
        weight,
        **asdict(settings),
        student_bias=student_bias,
        teacher_bias=teacher.bias,
        labels=labels,
        grad=grad,
        return_stats=return_stats,
        on_statistics=None if ranks is None else partial(_statistics_over_ranks, ranks, labels is not None),
        on_sums=None if ranks is None else partial(_sums_over_ranks, ranks),
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


# What the ranks make of their tiles' partial sums lies in the first tile, as if the others had no column.


def _statistics_over_ranks(vocabulary: Vocabulary, has_labels: bool, table: Tensor) -> None:
    """The table (n, 7, tiles) of log-sum-exp parts, those of the label's softmax only if it is there."""
    max_s, sum_s, max_t, sum_t, gaps, max_y, sum_y = table.unbind(1)
    maxima = [max_s, max_t, max_y] if has_labels else [max_s, max_t]
    tops = vocabulary.maximum(*(tile.amax(-1, keepdim=True) for tile in maxima))
    parts = [(sum_s, max_s, tops[0]), (sum_t, max_t, tops[1])]
    parts += [(gaps, torch.maximum(max_s, max_t), torch.maximum(tops[0], tops[1]))]
    if has_labels:
        parts += [(sum_y, max_y, tops[2])]
    sums = vocabulary.sum(*((part * exp_below(tile, top)).sum(-1) for part, tile, top in parts))
    for column, top in zip(maxima, tops, strict=True):
        column.fill_(-torch.inf)[:, :1] = top
    for (column, *_), total in zip(parts, sums, strict=True):
        column.zero_()[:, 0] = total


def _sums_over_ranks(vocabulary: Vocabulary, table: Tensor) -> None:
    """The table (n, 8, tiles) of the divergence's sums."""
    (total,) = vocabulary.sum(table.sum(-1))
    table.zero_()[:, :, 0] = total
