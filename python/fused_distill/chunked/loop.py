"""The chunk loop: project to logits, compute losses and logit gradients, accumulate parameter gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from ..config import LossConfig
from ..parallel.dtensor import gather_dtensor
from ..parallel.vocab_shard import VocabShard
from ..rows.backend import choose_backend, make_row_loss
from ..rows.base import RowLoss, StudentRows
from ..stats import DistillStats, RowResult
from .autograd import FusedLoss, Gradients, LossOutput, Student
from .gemm import accumulation_dtype, autocast_dtype
from .lm_head import IndexedLMHead, LMHead, logit_buffer
from .teacher import Teacher
from .tensors import LossTensors
from .workspace import ChunkPlan, Workspace, default_workspace_bytes, plan_chunks


@dataclass(frozen=True)
class LossInputs:
    """The constants of a loss; tokens are flattened."""

    teacher: Teacher
    shard: VocabShard
    dtype: torch.dtype  # of logits, losses and accumulated gradients
    autocast: torch.dtype | None  # dtype of the products under autocast
    token_weight: Tensor | None  # (N,)
    labels: Tensor | None  # (N,) int64
    valid_token_ids: Tensor | None  # (n,) int64 positions of the tokens that count; None: all tokens

    def n_valid(self, student: Student) -> int:
        """Return the number of tokens that count."""
        return len(student.hidden) if self.valid_token_ids is None else len(self.valid_token_ids)


def fused_loss(tensors: LossTensors, config: LossConfig) -> Tensor | tuple[Tensor, DistillStats]:
    """Check the tensors and compute the loss, or with config.return_stats (loss, DistillStats)."""
    shard = tensors.check(config)
    weight, bias = gather_dtensor(tensors.student_weight), gather_dtensor(tensors.student_bias)
    tensors = tensors._replace(
        student_weight=weight, student_bias=bias, teacher=tensors.teacher.prepare(shard, tensors.mask)
    )
    if config.backend == "reference":
        return reference.loss_by_definition(tensors, config)
    # torch.compile does not trace the loop: the call is a graph break.
    run = _outside_the_compiler() if torch.compiler.is_compiling() else _eager_fused_loss
    return run(tensors, config, shard)


@lru_cache
def _outside_the_compiler() -> Any:
    """Return `_eager_fused_loss` with compilation disabled, which imports dynamo when first used."""
    return torch.compiler.disable(_eager_fused_loss)


def _eager_fused_loss(
    tensors: LossTensors, config: LossConfig, shard: VocabShard
) -> Tensor | tuple[Tensor, DistillStats]:
    hidden, shape = tensors.student_hidden, tensors.student_hidden.shape[:-1]
    student = Student(hidden.reshape(-1, hidden.shape[-1]), tensors.student_weight, tensors.student_bias)
    teacher, token_weight, labels, mask = tensors.teacher, tensors.token_weight, tensors.labels, tensors.mask
    inputs = LossInputs(
        teacher,
        shard,
        accumulation_dtype(hidden, tensors.student_weight, *teacher.products.values()),
        autocast_dtype(hidden.device),
        None if token_weight is None else token_weight.detach().reshape(-1),
        None if labels is None or config.hard_weight == 0 else labels.reshape(-1).long().contiguous(),
        None if mask is None else mask.reshape(-1).nonzero().squeeze(1),
    )
    n_valid = inputs.n_valid(student)
    config = replace(config, backend=choose_backend(config.backend, hidden.device, inputs.dtype))
    row_loss = make_row_loss(
        config.backend, config, teacher.k, n_valid * shard.max_local_size, shard.is_sharded
    )
    compute = partial(chunked_loss, inputs=inputs, config=config, row_loss=row_loss)
    needs_grad = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in student)
    outputs = FusedLoss.apply(compute, config.reduction == "none", needs_grad, *student)
    loss, *columns = cast("tuple[Any, ...]", outputs)
    if config.reduction == "none":
        loss = loss.reshape(shape)
    elif config.reduction == "mean" and n_valid:  # no valid token: 0 even if the normalizer is 0
        loss = loss / (n_valid if tensors.normalizer is None else tensors.normalizer)
    if not config.return_stats:
        return loss
    return loss, DistillStats(*columns).map(lambda c: c.reshape(shape))


def chunked_loss(
    student: Student,
    *,
    inputs: LossInputs,
    config: LossConfig,
    row_loss: RowLoss,
    per_token: bool,
    needs_grad: tuple[bool, ...],  # of hidden, weight, bias
    factor: Tensor | None = None,  # (N,) multiplies each token's loss
    return_stats: bool = True,  # False: no statistics, even if the options ask for them
) -> LossOutput:
    """Run the chunk loop; return losses, the needed gradients of their sum, and statistics."""
    if not return_stats:
        config = replace(config, return_stats=False)
    token_weight = inputs.token_weight
    if factor is not None:
        token_weight = factor if token_weight is None else factor * token_weight
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        loop = _ChunkLoop(student, inputs, config, row_loss, needs_grad)
        rows, gradients = loop.run(token_weight)
        to_tokens = partial(_scatter_to_tokens, inputs.valid_token_ids, len(student.hidden))
        loss = to_tokens(rows.loss) if per_token else rows.loss.sum()
        return LossOutput(loss, None if rows.stats is None else rows.stats.map(to_tokens), gradients)


def _scatter_to_tokens(valid_token_ids: Tensor | None, n_tokens: int, column: Tensor) -> Tensor:
    """Return (n,) values of the valid tokens as (N,), 0 elsewhere."""
    if valid_token_ids is None:
        return column
    return column.new_zeros(n_tokens).index_copy_(0, valid_token_ids, column)


@dataclass(frozen=True)
class _ChunkLoop:
    student: Student
    inputs: LossInputs
    config: LossConfig
    row_loss: RowLoss
    needs_grad: tuple[bool, ...]

    def plan(self) -> ChunkPlan:
        """Return chunk sizes that keep temporary memory within workspace_bytes on every rank."""
        student, inputs, dtype = self.student, self.inputs, self.inputs.dtype
        hidden_size, n_columns = student.hidden.shape[-1], inputs.shard.max_local_size
        weight = student.weight[:1].expand(n_columns, -1)  # the largest rank's head, without its memory
        teacher = inputs.teacher.workspace(n_columns, dtype, inputs.autocast)
        head = self._head(weight)
        separate_grad = head.dtype.itemsize if self._separate_grad(head) else 0
        tensors = Workspace(
            fixed=64 * len(student.hidden),  # losses, statistics, weights and positions of all tokens
            per_row=head.n_logits * (dtype.itemsize + separate_grad)
            + 2 * hidden_size * dtype.itemsize  # the chunk's hidden states and their gradient
            + 512,  # numbers of the row arithmetic
        )
        need = head.workspace() + teacher + self.row_loss.workspace(head.n_logits, dtype) + tensors
        # The two heads are multiplied one after the other.
        need = replace(need, fixed=need.fixed - min(head.workspace().fixed, teacher.fixed))
        head_bytes = weight.numel() * dtype.itemsize
        bound = self.config.workspace_bytes or default_workspace_bytes(student.hidden.device.type, head_bytes)
        return plan_chunks(inputs.n_valid(student), bound, need)

    def run(self, token_weight: Tensor | None) -> tuple[RowResult, Gradients]:
        """Return losses and statistics of the n valid tokens, and the gradients of the losses' sum."""
        plan = self.plan()
        student, inputs, dtype = self.student, self.inputs, self.inputs.dtype
        shard, device, valid = inputs.shard, student.hidden.device, inputs.valid_token_ids
        weight = student.weight[: shard.size]
        # Kernels read vectors as contiguous.
        bias = None if student.bias is None else student.bias[: shard.size].to(dtype).contiguous()
        head = self._head(weight)
        gradients = self._empty_gradients(head.rows_written_by_first_chunk)
        if token_weight is None:
            token_weight = torch.ones((), dtype=dtype, device=device).expand(len(student.hidden))

        rows = min(plan.rows, plan.n_tokens)
        use_kernels = self.config.backend == "triton"
        read_teacher = inputs.teacher.reader(shard, rows, dtype, inputs.autocast, use_kernels=use_kernels)
        logits = logit_buffer(rows, head.n_logits, dtype, device)
        grad_buffer = None
        if self._separate_grad(head):
            grad_buffer = logit_buffer(rows, head.n_logits, head.dtype, device)

        results: list[RowResult] = []
        for chunk in plan.chunks():
            n = chunk.stop - chunk.start
            tokens = chunk if valid is None else valid[chunk]
            teacher_rows = read_teacher(tokens)
            if isinstance(head, IndexedLMHead) and teacher_rows.ids is not None:
                head = head.at(teacher_rows.ids, plan.block_rows)
            hidden = student.hidden[tokens].to(head.dtype)
            student_rows = StudentRows(
                head.project(hidden, logits[:n]),
                token_weight[tokens].to(dtype).contiguous(),  # a fixed layout avoids recompilation
                bias,
                None if inputs.labels is None else shard.local_labels(inputs.labels[tokens]),
            )
            grad = None
            if any(self.needs_grad):
                grad = student_rows.logits if grad_buffer is None else grad_buffer[:n]
            results.append(
                self.row_loss(
                    student_rows,
                    teacher_rows,
                    self.config,
                    grad=grad,
                    group=shard.group,
                    block_rows=plan.block_rows,
                )
            )
            if grad is not None:
                _accumulate(gradients, grad, head, hidden, tokens, first=chunk.start == 0)
        if gradients.hidden is not None:
            shard.group.all_reduce_sum_(gradients.hidden)
        return RowResult.concatenate(results), gradients

    def _head(self, weight: Tensor) -> LMHead | IndexedLMHead:
        inputs, k = self.inputs, self.inputs.teacher.k
        if k is not None and self.config.projects_support_only:
            head = IndexedLMHead
            if self.config.backend == "triton":
                from .indexed_triton import TritonIndexedLMHead as head
            return head(weight, inputs.dtype, weight.new_empty((0, k), dtype=torch.int64))
        return LMHead.for_inputs(self.student.hidden, weight, inputs.dtype, inputs.autocast)

    def _separate_grad(self, head: LMHead | IndexedLMHead) -> bool:
        """Return True if the logit gradient cannot overwrite the student's logits, whose dtype differs."""
        return any(self.needs_grad) and head.dtype != self.inputs.dtype

    def _empty_gradients(self, rows_written_by_first_chunk: int) -> Gradients:
        """Return the buffers that `_accumulate` fills; zeros where it does not write."""
        student, dtype = self.student, self.inputs.dtype
        hidden, weight, bias = self.needs_grad
        gradients = Gradients(
            torch.empty_like(student.hidden, dtype=dtype) if hidden else None,
            torch.empty_like(student.weight, dtype=dtype) if weight else None,
            torch.zeros_like(student.bias, dtype=dtype) if bias and student.bias is not None else None,
        )
        if gradients.hidden is not None and self.inputs.valid_token_ids is not None:
            gradients.hidden.zero_()
        if gradients.weight is not None:
            gradients.weight[rows_written_by_first_chunk:].zero_()
        return gradients


def _accumulate(
    gradients: Gradients,
    grad: Tensor,  # (n, C) logit gradient
    head: LMHead | IndexedLMHead,
    hidden: Tensor,  # (n, Ds)
    tokens: slice | Tensor,
    *,
    first: bool,
) -> None:
    """Add the products of one chunk to the gradients, in the accumulation dtype."""
    if gradients.hidden is not None:
        if isinstance(tokens, slice):
            head.back_project(grad, gradients.hidden[tokens])
        else:
            out = torch.empty_like(hidden, dtype=gradients.hidden.dtype)
            gradients.hidden[tokens] = head.back_project(grad, out)
    if gradients.weight is not None:
        head.add_weight_gradient(grad, hidden, gradients.weight, overwrite=first)
    if gradients.bias is not None:
        head.add_bias_gradient(grad, gradients.bias)
