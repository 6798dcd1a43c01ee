"""The chunk loop that all backends share: project, do the row arithmetic, multiply the gradient out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._plan import ChunkPlan, default_workspace_bytes, plan_chunks
from ._settings import DistillStats, LossSettings, RowResult

# A head's tile that fits the caches: CPU projections of few tokens are 1.2 times as fast tile by tile, and so
# they stay while a converted tile is read back.
_TILE_BYTES = {"cpu": 4 << 20}
_DEFAULT_TILE_BYTES = 16 << 20


class RowStep(Protocol):
    """The innermost step, all that differs between backends: row arithmetic on a chunk of logits."""

    def __call__(
        self,
        student_logits: Tensor,  # (n, V) float32 / float64, as projected
        teacher_logits: Tensor,  # (n, V) the same dtype
        weight: Tensor,  # (n,) the same dtype, factor of each row's loss
        settings: LossSettings,
        *,
        student_bias: Tensor | None,  # (V,)
        teacher_bias: Tensor | None,  # (V,)
        labels: Tensor | None,  # (n,) int64, -100 where there is none
        grad: Tensor | None,  # (n, V), may be student_logits itself: receives the logit gradient
        return_stats: bool,
        block_rows: int,  # rows whose temporaries may be held at once
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


class LossTensors(NamedTuple):
    """Every tensor of one call, tokens flattened. `counted` lists the tokens that count, None means all."""

    student_hidden: Tensor  # (N, Ds)
    student_weight: Tensor  # (Vs, Ds)
    student_bias: Tensor | None  # (Vs,)
    teacher_hidden: Tensor  # (N, Dt)
    teacher_weight: Tensor  # (Vt, Dt)
    teacher_bias: Tensor | None  # (Vt,)
    token_weight: Tensor | None  # (N,)
    labels: Tensor | None  # (N,) int64
    counted: Tensor | None  # (n,) int64


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
    vocab_size: int
    needs_grad: tuple[bool, ...]  # of hidden, weight, bias
    autocast_dtype: torch.dtype | None  # dtype of the products under autocast
    return_stats: bool
    workspace_bytes: int | None

    def without_grad(self) -> Engine:
        """The same loss, its value only."""
        return replace(self, needs_grad=(False, False, False))

    def plan(self, tensors: LossTensors) -> ChunkPlan:
        """Chunk sizes that keep temporary memory, gradients aside, within workspace_bytes."""
        dtype = accumulation_dtype(tensors)
        student, teacher = self._heads(tensors)
        n_tokens = len(tensors.student_hidden) if tensors.counted is None else len(tensors.counted)
        logit_bytes = self.vocab_size * dtype.itemsize
        grad_bytes = self.vocab_size * student.dtype.itemsize if self._separate_grad(student, dtype) else 0
        head_bytes = tensors.student_weight.numel() * dtype.itemsize
        bound = self.workspace_bytes or default_workspace_bytes(
            tensors.student_hidden.device.type, head_bytes
        )
        return plan_chunks(
            n_tokens,
            bound,
            fixed_bytes=student.tile_bytes + teacher.tile_bytes + 64 * len(tensors.student_hidden),
            row_bytes=2 * logit_bytes
            + grad_bytes
            + self._hidden_bytes(tensors, dtype)
            + self.vocab_size // 64
            + 512,
            block_row_bytes=self.backend.block_tensors * logit_bytes,
            block_rows=self.backend.block_elements // self.vocab_size,
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
        hidden, counted = tensors.student_hidden, tensors.counted
        device, dtype = hidden.device, accumulation_dtype(tensors)
        student, teacher = self._heads(tensors)
        gradients = self._empty_gradients(tensors, plan.n_tokens, dtype)
        loss = torch.empty(plan.n_tokens, dtype=dtype, device=device)
        stats = DistillStats.zeros((plan.n_tokens,), dtype, device) if self.return_stats else None
        if token_weight is None:
            token_weight = torch.ones((), dtype=dtype, device=device).expand(len(hidden))

        rows = min(plan.rows, plan.n_tokens)
        student_buffer = _logit_buffer(rows, self.vocab_size, dtype, device)
        teacher_buffer = _logit_buffer(rows, self.vocab_size, dtype, device)
        grad_buffer = None
        if self._separate_grad(student, dtype):
            grad_buffer = _logit_buffer(rows, self.vocab_size, student.dtype, device)

        for chunk in plan.chunks():
            n = chunk.stop - chunk.start
            tokens = chunk if counted is None else counted[chunk]
            student_hidden = hidden[tokens].to(student.dtype)
            student_logits = student.project(student_hidden, student_buffer[:n])
            grad = None
            if any(self.needs_grad):
                grad = student_logits if grad_buffer is None else grad_buffer[:n]
            result = self.backend.step(
                student_logits,
                teacher.project(tensors.teacher_hidden[tokens].to(teacher.dtype), teacher_buffer[:n]),
                token_weight[tokens].to(dtype).contiguous(),  # one layout is one compilation
                self.settings,
                student_bias=student.bias,
                teacher_bias=teacher.bias,
                labels=None if tensors.labels is None else tensors.labels[tokens],
                grad=grad,
                return_stats=self.return_stats,
                block_rows=plan.block_rows,
            )
            loss[chunk] = result.loss
            if stats is not None and result.stats is not None:
                for whole, part in zip(stats, result.stats, strict=True):
                    whole[chunk] = part
            if grad is not None:
                self._accumulate(gradients, grad, student, student_hidden, tokens, first=chunk.start == 0)
        return loss, stats, gradients

    def _accumulate(
        self,
        gradients: Gradients,
        grad: Tensor,  # (n, V)
        student: Head,
        student_hidden: Tensor,  # (n, Ds)
        tokens: slice | Tensor,
        *,
        first: bool,
    ) -> None:
        """Add one chunk's products to the gradients, in the accumulation dtype."""
        if gradients.hidden is not None:
            if isinstance(tokens, slice):
                student.back_project(grad, gradients.hidden[tokens])
            else:
                gradients.hidden[tokens] = student.back_project(
                    grad, torch.empty_like(student_hidden, dtype=gradients.hidden.dtype)
                )
        if gradients.weight is not None:
            _product(grad.T, student_hidden, gradients.weight[: self.vocab_size], accumulate=not first)
        if gradients.bias is not None:
            gradients.bias[: self.vocab_size] += grad.sum(0, dtype=gradients.bias.dtype)

    def _empty_gradients(self, tensors: LossTensors, n_tokens: int, dtype: torch.dtype) -> Gradients:
        """Buffers that `_accumulate` fills; zeros where it will not write."""
        hidden, weight, bias = self.needs_grad
        fills_hidden = tensors.counted is None
        gradients = Gradients(
            torch.empty_like(tensors.student_hidden, dtype=dtype) if hidden else None,
            torch.empty_like(tensors.student_weight, dtype=dtype) if weight else None,
            torch.zeros_like(tensors.student_bias, dtype=dtype)
            if bias and tensors.student_bias is not None
            else None,
        )
        if gradients.hidden is not None and not fills_hidden:
            gradients.hidden.zero_()
        if gradients.weight is not None:
            gradients.weight[self.vocab_size if n_tokens else 0 :].zero_()
        return gradients

    def _heads(self, tensors: LossTensors) -> tuple[Head, Head]:
        t, dtype = tensors, accumulation_dtype(tensors)
        return (
            self._head(t.student_hidden, t.student_weight, t.student_bias, dtype),
            self._head(t.teacher_hidden, t.teacher_weight, t.teacher_bias, dtype),
        )

    def _head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, accumulation: torch.dtype) -> Head:
        """One model's head with the product dtype that suits its inputs, autocast and the device."""
        dtype = self.autocast_dtype or torch.promote_types(hidden.dtype, weight.dtype)
        if accumulation == torch.float64 or not _multiplies_into_float32(hidden.device, dtype):
            dtype = accumulation
        bias = None if bias is None else bias[: self.vocab_size].to(accumulation)
        return Head(weight[: self.vocab_size], bias, dtype)

    def _separate_grad(self, student: Head, dtype: torch.dtype) -> bool:
        """Whether the logit gradient has a buffer of its own, not the student logits' place."""
        return any(self.needs_grad) and student.dtype != dtype

    def _hidden_bytes(self, tensors: LossTensors, dtype: torch.dtype) -> int:
        """Bytes per token of gathered or converted hidden states and of a hidden gradient on its way."""
        return (2 * tensors.student_hidden.shape[-1] + tensors.teacher_hidden.shape[-1]) * dtype.itemsize


@dataclass(frozen=True)
class Head:
    """The compared rows of one output layer, multiplied in `dtype`, converted tile by tile if need be."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,) in the accumulation dtype
    dtype: torch.dtype

    @property
    def tile_bytes(self) -> int:
        """Temporary bytes of a converted tile, 0 where the weight already has the product dtype."""
        return (
            0
            if self.weight.dtype == self.dtype
            else self._tile_rows * self.weight.shape[1] * self.dtype.itemsize
        )

    @property
    def _tile_rows(self) -> int:
        tile_bytes = _TILE_BYTES.get(self.weight.device.type, _DEFAULT_TILE_BYTES)
        rows = tile_bytes // (self.weight.shape[1] * self.dtype.itemsize)
        return max(1, min(rows, len(self.weight)))

    def _tiles(self, *, whole: bool) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of the weight in the product dtype; with whole, one if no conversion is needed."""
        if whole and self.weight.dtype == self.dtype:
            yield slice(0, len(self.weight)), self.weight
            return
        for start in range(0, len(self.weight), self._tile_rows):
            columns = slice(start, start + self._tile_rows)
            yield columns, self.weight[columns].to(self.dtype)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out (n, V) = hidden (n, D) @ weight^T."""
        for columns, tile in self._tiles(whole=hidden.device.type != "cpu"):
            _product(hidden, tile.T, out[:, columns])
        return out

    def back_project(self, grad: Tensor, out: Tensor) -> Tensor:
        """out (n, D) = grad (n, V) @ weight."""
        for columns, tile in self._tiles(whole=True):
            _product(grad[:, columns], tile, out, accumulate=columns.start > 0)
        return out


def accumulation_dtype(tensors: LossTensors) -> torch.dtype:
    """The dtype of logits, losses and accumulated gradients: float64 where an input is, else float32."""
    inputs = (tensors.student_hidden, tensors.student_weight, tensors.teacher_hidden, tensors.teacher_weight)
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def _logit_buffer(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, vocab_size). On the CPU 64 bytes lie between rows: at a distance of a power of two, as most
    vocabularies give, all rows compete for the same places in the caches."""
    padding = 64 // dtype.itemsize if device.type == "cpu" else 0
    return torch.empty(rows, vocab_size + padding, dtype=dtype, device=device)[:, :vocab_size]


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, never rounded to a's dtype on the way."""
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        torch.mm(a, b, out=out, **options)


@lru_cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this dtype into a float32 result."""
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    probe = torch.ones(16, 16, dtype=dtype, device=device)
    result = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        _product(probe, probe, result)
        _product(probe, probe, result, accumulate=True)
    except (RuntimeError, TypeError):
        return False
    return True
