"""Row loss for a full-vocabulary teacher on the CPU in C++, which takes a row through all stages at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import DivergenceForm, LossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult
from .base import StudentRows, TailStatistics, TeacherRows
from .cpp.library import arguments_type, call, pointer
from .elementwise import log_ratio
from .surplus import Surplus
from .tail_cpp import CppTail


class Stage(IntEnum):
    """Stages of a row in cpp/jsd.cpp."""

    MAXIMA = 0
    SUMS = 1
    LOSSES = 2
    GRADIENT = 3


class State(NamedTuple):
    """Numbers of n rows that the stages read and write, (n,) float64 each, in the order of cpp/jsd.cpp."""

    max_s: Tensor
    max_t: Tensor
    max_y: Tensor
    sum_s: Tensor
    sum_t: Tensor
    sum_y: Tensor
    diff_sum: Tensor
    lse_diff: Tensor
    shift: Tensor
    loss: Tensor
    centre: Tensor
    teacher_led: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor
    label_derivative: Tensor


_Arguments = arguments_type(
    rows="i",
    columns="i",
    threads="i",
    student="p",
    student_stride="i",
    teacher="p",
    teacher_stride="i",
    student_bias="p",
    teacher_bias="p",
    labels="p",
    reverse_weight="p",
    scalars="p",
    form="i",
    clips="i",
    return_stats="i",
    student_has_softcap="i",
    teacher_has_softcap="i",
    first_stage="i",
    last_stage="i",
    weight="p",
    grad="p",
    grad_stride="i",
    state="p",
)


@dataclass(frozen=True)
class CppJSD:
    """The divergence of each row. Both models' logits are overwritten."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of the rows' numbers."""
        del n_columns, dtype
        return Workspace(per_row=8 * len(State._fields))

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
        """Return losses and statistics; see `RowLoss`.

        Reductions over ranks, surplus rows and token weights come between stages. Without them a single call
        does everything.
        """
        group = group or ShardGroup()
        width = teacher.values.shape[1]
        compared, surplus_rows = student, None
        if student.logits.shape[1] > width:
            compared, surplus_rows = student.split(width)
        out = None if grad is None else grad[:, :width]
        numbers = student.logits.new_empty((len(student.logits), len(State._fields)), dtype=torch.float64)
        state = State(*numbers.unbind(1))

        def run(first: Stage, last: Stage) -> None:
            _run(compared, teacher, config, out, numbers, first, last)

        sharded, last = group.process_group is not None, Stage.GRADIENT
        if sharded:
            run(Stage.MAXIMA, Stage.MAXIMA)
            _reduce(group.all_reduce_max, state[:3])
            run(Stage.SUMS, Stage.SUMS)
            _reduce(group.all_reduce_sum, state[3:7])
            state.lse_diff.copy_(log_ratio(state.sum_s, state.sum_t, state.diff_sum))
        elif surplus_rows is not None:
            run(Stage.MAXIMA, Stage.SUMS)
        surplus, passes = None, CppTail()
        if surplus_rows is not None:
            tail = passes.statistics(surplus_rows.logits, surplus_rows.bias, config, block_rows=block_rows)
            surplus = _beside_surplus(state, tail)
        interrupted = sharded or surplus is not None
        if interrupted or student.weigh is not None:
            last = Stage.LOSSES
        run(Stage.LOSSES if interrupted else Stage.MAXIMA, last)
        if sharded:
            _reduce(group.all_reduce_sum, state[9:17])

        if surplus is not None:
            state.top1_agreement.mul_(surplus.tail.max_z <= state.max_s)
        loss, centre, stats = state.loss, _centre(state, config), _stats(state, config)
        if surplus is not None:
            loss, centre, stats = surplus.added_to(loss, centre, stats, config, student.reverse_weight)
            if centre is not None:
                state.centre.copy_(centre if centre.dim() == 1 else centre[:, 0])
        dtype = student.logits.dtype
        result_stats = None
        if config.return_stats:
            result_stats = DistillStats(*(c if c.dtype == torch.bool else c.to(dtype) for c in stats))
        student = student.weighted(result_stats)
        compared = compared._replace(weight=student.weight, scaled_weight=student.scaled_weight)
        if grad is not None and last is Stage.LOSSES:
            run(Stage.GRADIENT, Stage.GRADIENT)
        if grad is not None and surplus is not None and surplus_rows is not None:
            x, bias, weight = surplus_rows.logits, surplus_rows.bias, student.grad_weight
            factors = surplus.gradient_factors(config, centre, weight, student.labels, student.reverse_weight)
            passes.gradient(x, bias, config, surplus.tail, *factors, grad[:, width:], block_rows=block_rows)
        return RowResult(loss.to(dtype) * student.weight, result_stats)


def _run(
    student: StudentRows,
    teacher: TeacherRows,
    config: LossConfig,
    grad: Tensor | None,
    numbers: Tensor,  # (n, columns of State) float64
    first: Stage,
    last: Stage,
) -> None:
    """Run the stages from first to last on all rows."""
    x, values, scalars = student.logits, teacher.values, config.scalars(torch.float64)
    arguments = _Arguments(
        rows=len(x),
        columns=values.shape[1],
        threads=torch.get_num_threads(),
        student=pointer(x, x.dtype),
        student_stride=x.stride(0),
        teacher=pointer(values, x.dtype),
        teacher_stride=values.stride(0),
        student_bias=pointer(student.bias, x.dtype),
        teacher_bias=pointer(teacher.bias, x.dtype),
        labels=pointer(student.labels, torch.int64),
        reverse_weight=pointer(student.reverse_weight, x.dtype),
        scalars=pointer(scalars, torch.float64),
        form=config.form,
        clips=config.entry_clip is not None,
        return_stats=config.return_stats,
        student_has_softcap=config.student_softcap is not None,
        teacher_has_softcap=config.teacher_softcap is not None,
        first_stage=first,
        last_stage=last,
        weight=pointer(student.grad_weight, x.dtype),
        grad=pointer(grad, x.dtype),
        grad_stride=0 if grad is None else grad.stride(0),
        state=pointer(numbers, torch.float64),
    )
    call("jsd", x.dtype, arguments)


def _reduce(reduction: Callable[..., tuple[Tensor, ...]], columns: tuple[Tensor, ...]) -> None:
    """Replace columns by their reduction over the ranks, in one collective."""
    for column, reduced in zip(columns, reduction(*columns), strict=True):
        column.copy_(reduced)


def _beside_surplus(state: State, tail: TailStatistics) -> Surplus:
    """Return the surplus rows' outcome, and let the state describe the student's softmax over all rows.

    The maximum that the compared tokens' log ratios are relative to stays their own, so that they keep their
    digits. Where the sum beyond it overflows, their probabilities are 0.
    """
    lse, lse_y = state.max_s + state.sum_s.log(), state.max_y + state.sum_y.log()
    surplus = Surplus.beside(lse, lse_y, tail)
    state.sum_s.copy_((surplus.lse - state.max_s).exp())
    _, (max_y, sum_y) = surplus.softmax_parts(state.max_s, state.max_y)
    state.max_y.copy_(max_y)
    state.sum_y.copy_(sum_y)
    state.lse_diff.add_(surplus.log_rest)
    return surplus


def _centre(state: State, config: LossConfig) -> Tensor | None:
    """Return what the gradient subtracts, as `full_torch` does."""
    if config.form is DivergenceForm.TOTAL_VARIATION:
        return torch.stack([state.centre, state.teacher_led], -1)
    subtracts = config.form is not DivergenceForm.FORWARD_KL or config.entry_clip is not None
    return state.centre if subtracts else None


def _stats(state: State, config: LossConfig) -> list[Tensor]:
    """Return the columns of `DistillStats`, or none."""
    return [*state[12:16], state.top1_agreement != 0] if config.return_stats else []
