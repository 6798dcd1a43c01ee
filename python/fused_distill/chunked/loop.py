"""The chunk loop of all losses and backends: project, do the row arithmetic, multiply the gradient out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import LossSettings
from ..parallel.vocab_shard import Vocabulary
from ..stats import DistillStats, RowResult
from .gemm import accumulation_dtype
from .lm_head import GatheredHead, Head, StudentHead, logit_buffer
from .teacher import Teacher, TeacherRows
from .workspace import ChunkPlan, default_workspace_bytes, plan_chunks


class RowStep(Protocol):
    """The innermost step, all that differs between losses and backends: arithmetic on a chunk of logits."""

    def __call__(
        self,
        student_logits: Tensor,  # (n, V) float32 / float64, as projected; may be overwritten
        teacher: TeacherRows,
        weight: Tensor,  # (n,) the same dtype, factor of each row's loss
        settings: LossSettings,
        *,
        student_bias: Tensor | None,  # (V,)
        labels: Tensor | None,  # (n,) int64, -100 where there is none, beyond V where another rank has it
        grad: Tensor | None,  # (n, V), may be student_logits itself: receives the logit gradient
        return_stats: bool,
        block_rows: int,  # rows whose temporaries may be held at once
        vocabulary: Vocabulary,  # whose V columns these are
    ) -> RowResult:
        """Losses and statistics of n rows."""
        ...


@dataclass(frozen=True)
class Backend:
    """A row step and the temporary memory it asks for."""

    name: str
    step: RowStep
    block_elements: int = 0  # logits per block of row arithmetic; 0: it needs no block-sized temporaries
    block_tensors: int = 0  # temporaries of a block's size
    row_bytes: int = 0  # other temporaries per row


class LossTensors(NamedTuple):
    """Every tensor of one call, tokens flattened. `counted` lists the tokens that count, None means all."""

    student_hidden: Tensor  # (N, Ds)
    student_weight: Tensor  # (Vs, Ds)
    student_bias: Tensor | None  # (Vs,)
    teacher: Teacher
    token_weight: Tensor | None  # (N,)
    labels: Tensor | None  # (N,) int64
    counted: Tensor | None  # (n,) int64

    @classmethod
    def flattened(
        cls,
        student_hidden: Tensor,  # (..., Ds)
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher: Teacher,
        *,
        token_weight: Tensor | None,  # (...)
        labels: Tensor | None,  # (...)
        mask: Tensor | None,  # (...) bool
    ) -> LossTensors:
        """From tensors in the caller's shapes."""
        return cls(
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_weight,
            student_bias,
            teacher,
            None if token_weight is None else token_weight.detach().reshape(-1),
            None if labels is None else labels.reshape(-1).long(),
            None if mask is None else mask.reshape(-1).nonzero().squeeze(1),
        )

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """See `_products.accumulation_dtype`."""
        return accumulation_dtype(self.student_hidden, self.student_weight, *self.teacher.floats)

    @property
    def n_counted(self) -> int:
        """How many tokens count."""
        return len(self.student_hidden) if self.counted is None else len(self.counted)


class Gradients(NamedTuple):
    """Gradients of the summed loss, in the accumulation dtype; None where not asked for."""

    hidden: Tensor | None = None  # (N, Ds)
    weight: Tensor | None = None  # (Vs, Ds)
    bias: Tensor | None = None  # (Vs,)


@dataclass(frozen=True)
class Engine:
    """One loss on one backend, ready to run on tensors."""

    settings: LossSettings
    backend: Backend
    vocabulary: Vocabulary
    needs_grad: tuple[bool, ...]  # of hidden, weight, bias
    autocast_dtype: torch.dtype | None  # dtype of the products under autocast
    return_stats: bool
    workspace_bytes: int | None
    support_size: int | None = None  # K: project K columns per token; None: the whole vocabulary

    def without_grad(self) -> Engine:
        """The same loss, its value only."""
        return replace(self, needs_grad=(False, False, False))

    def plan(self, tensors: LossTensors) -> ChunkPlan:
        """Chunk sizes that keep temporary memory, gradients aside, within workspace_bytes on every rank."""
        dtype, teacher, vocab_size = tensors.accumulation_dtype, tensors.teacher, self.vocabulary.largest
        # A head of the largest block, without its memory.
        weight = tensors.student_weight[:1].expand(vocab_size, -1)
        student = self._student_head(tensors, weight)
        columns = student.n_columns + teacher.buffer_columns(vocab_size)
        separate_grad = (
            student.n_columns * student.dtype.itemsize if self._separate_grad(student, dtype) else 0
        )
        hidden_bytes = 2 * tensors.student_hidden.shape[-1] * dtype.itemsize
        return plan_chunks(
            tensors.n_counted,
            self.workspace_bytes
            or default_workspace_bytes(tensors.student_hidden.device.type, weight.numel() * dtype.itemsize),
            # The heads are multiplied one after the other.
            fixed_bytes=max(student.fixed_bytes, teacher.fixed_bytes(vocab_size, dtype, self.autocast_dtype))
            + 64 * len(tensors.student_hidden),
            row_bytes=columns * dtype.itemsize
            + separate_grad
            + hidden_bytes
            + student.row_bytes
            + teacher.row_bytes(dtype)
            + self.backend.row_bytes
            + vocab_size // 24  # partial sums of kernels
            + 512,
            block_row_bytes=self.backend.block_tensors * student.n_columns * dtype.itemsize
            + student.block_row_bytes,
            block_rows=student.block_rows or self.backend.block_elements // student.n_columns,
        )

    def run(
        self, tensors: LossTensors, token_weight: Tensor | None
    ) -> tuple[Tensor, DistillStats | None, Gradients]:
        """Weighted losses of the counted tokens (n,), their statistics, the gradients of the losses' sum."""
        with torch.no_grad(), torch.autocast(tensors.student_hidden.device.type, enabled=False):
            return self._run(tensors, token_weight)

    def _run(
        self, tensors: LossTensors, token_weight: Tensor | None
    ) -> tuple[Tensor, DistillStats | None, Gradients]:
        plan = self.plan(tensors)
        hidden, counted, teacher = tensors.student_hidden, tensors.counted, tensors.teacher
        device, dtype = hidden.device, tensors.accumulation_dtype
        vocab_size = self.vocabulary.size
        student = self._student_head(tensors, tensors.student_weight[:vocab_size], plan.block_rows)
        bias = None if tensors.student_bias is None else tensors.student_bias[:vocab_size].to(dtype)
        gradients = self._empty_gradients(tensors, student, dtype)
        if token_weight is None:
            token_weight = torch.ones((), dtype=dtype, device=device).expand(len(hidden))

        rows = min(plan.rows, plan.n_tokens)
        student_buffer = logit_buffer(rows, student.n_columns, dtype, device)
        teacher_buffer = logit_buffer(rows, teacher.buffer_columns(vocab_size), dtype, device)
        grad_buffer = None
        if self._separate_grad(student, dtype):
            grad_buffer = logit_buffer(rows, student.n_columns, student.dtype, device)

        results: list[RowResult] = []
        for chunk in plan.chunks():
            n = chunk.stop - chunk.start
            tokens = chunk if counted is None else counted[chunk]
            teacher_rows = teacher.read(tokens, teacher_buffer[:n], self.autocast_dtype)
            student_hidden = hidden[tokens].to(student.dtype)
            student_logits = student.project(student_hidden, student_buffer[:n], teacher_rows.ids)
            grad = None
            if any(self.needs_grad):
                grad = student_logits if grad_buffer is None else grad_buffer[:n]
            result = self.backend.step(
                student_logits,
                teacher_rows,
                token_weight[tokens].to(dtype).contiguous(),  # one layout is one compilation
                self.settings,
                student_bias=bias,
                labels=None if tensors.labels is None else self.vocabulary.column(tensors.labels[tokens]),
                grad=grad,
                return_stats=self.return_stats,
                block_rows=plan.block_rows,
                vocabulary=self.vocabulary,
            )
            results.append(result)
            if grad is not None:
                _accumulate(
                    gradients, grad, student, student_hidden, tokens, teacher_rows.ids, chunk.start == 0
                )
        if gradients.hidden is not None:
            self.vocabulary.add_up(gradients.hidden)
        whole = RowResult.concatenate(results)
        return whole.loss, whole.stats, gradients

    def _empty_gradients(self, tensors: LossTensors, student: StudentHead, dtype: torch.dtype) -> Gradients:
        """Buffers that `_accumulate` fills; zeros where it will not write."""
        hidden, weight, bias = self.needs_grad
        gradients = Gradients(
            torch.empty_like(tensors.student_hidden, dtype=dtype) if hidden else None,
            torch.empty_like(tensors.student_weight, dtype=dtype) if weight else None,
            torch.zeros_like(tensors.student_bias, dtype=dtype)
            if bias and tensors.student_bias is not None
            else None,
        )
        if gradients.hidden is not None and tensors.counted is not None:
            gradients.hidden.zero_()
        if gradients.weight is not None:
            gradients.weight[student.overwritten_rows :].zero_()
        return gradients

    def _student_head(
        self, tensors: LossTensors, weight: Tensor, block_rows: int | None = None
    ) -> StudentHead:
        dtype = tensors.accumulation_dtype
        if self.support_size is not None:
            return GatheredHead.of(weight, dtype, self.support_size, block_rows)
        return Head.of(tensors.student_hidden, weight, dtype, self.autocast_dtype)

    def _separate_grad(self, student: StudentHead, dtype: torch.dtype) -> bool:
        """Whether the logit gradient has a buffer of its own, not the student logits' place."""
        return any(self.needs_grad) and student.dtype != dtype


def _accumulate(
    gradients: Gradients,
    grad: Tensor,  # (n, n_columns)
    student: StudentHead,
    student_hidden: Tensor,  # (n, Ds)
    tokens: slice | Tensor,
    ids: Tensor | None,  # (n, K)
    first: bool,
) -> None:
    """Add one chunk's products to the gradients, in the accumulation dtype."""
    if gradients.hidden is not None:
        if isinstance(tokens, slice):
            student.back_project(grad, gradients.hidden[tokens], ids)
        else:
            gradients.hidden[tokens] = student.back_project(
                grad, torch.empty_like(student_hidden, dtype=gradients.hidden.dtype), ids
            )
    if gradients.weight is not None:
        student.add_weight_gradient(grad, student_hidden, gradients.weight, ids, first=first)
    if gradients.bias is not None:
        student.add_bias_gradient(grad, gradients.bias, ids)
