"""The chunk loop: project to logits, compute losses and logit gradients, accumulate parameter gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
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
from ..tracing import check_has_data
from .autograd import FusedLoss, Gradients, LossOutput, Student
from .gemm import accumulation_dtype, autocast_dtype, float64_if_supported
from .grad_scale import excess_over_bound, float16_grad_scale
from .huge_pages import in_huge_pages
from .lm_head import IndexedLMHead, LMHead, logit_buffer
from .memory import CallMemory, call_memory, memory_of
from .teacher import TopKTeacher
from .tensors import LossInputs, LossTensors
from .workspace import ChunkPlan


def fused_loss(tensors: LossTensors, config: LossConfig) -> Tensor | tuple[Tensor, DistillStats]:
    """Check the tensors and compute the loss, or with config.return_stats (loss, DistillStats)."""
    check_has_data("student_hidden", tensors.student_hidden, tensors.mask)
    shard = tensors.check(config)
    weight, bias = gather_dtensor(tensors.student_weight), gather_dtensor(tensors.student_bias)
    tensors = tensors._replace(
        student_weight=weight, student_bias=bias, teacher=tensors.teacher.prepare(shard, tensors.mask)
    )
    if config.backend == "reference":
        return reference.loss_by_definition(tensors, config)
    shape, mask = tensors.student_hidden.shape[:-1], tensors.mask
    valid_token_ids = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    call = prepare(tensors, config, shard, device_of(tensors.student_hidden), valid_token_ids)
    n_valid = call.inputs.n_valid(call.student)
    divisor = None
    if config.reduction == "mean" and n_valid:  # no valid token: 0 even if the normalizer is 0
        divisor = n_valid if tensors.normalizer is None else tensors.normalizer
        if isinstance(divisor, Tensor):  # a counter of the caller's may go on before a second backward pass
            divisor = divisor.detach().clone()
    compute = partial(
        chunked_loss, inputs=call.inputs, config=call.config, row_loss=call.row_loss, divisor=divisor
    )
    per_token = config.reduction == "none"
    if per_token:  # backward's chunks may need more memory than those of forward, and must not fail later
        call.plan(memory_of(call.inputs.device))
    outputs = FusedLoss.apply(compute, per_token, call.needs_grad, call.inputs.constants, *call.student)
    loss, *columns = cast("tuple[Any, ...]", outputs)
    if config.reduction == "none":
        loss = loss.reshape(shape)
    if not config.return_stats:
        return loss
    return loss, DistillStats(*columns).map(lambda c: c.reshape(shape))


def device_of(hidden: Tensor) -> torch.device:
    """Return the device that chunk sizes and products are chosen for."""
    return hidden.device


def prepare(
    tensors: LossTensors,
    config: LossConfig,
    shard: VocabShard,
    device: torch.device,
    valid_token_ids: Tensor | None,  # (n,) int64; None: all tokens
) -> ChunkLoop:
    """Return the loop for checked tensors; its plan is all that it can compute from meta tensors."""
    hidden, teacher = tensors.student_hidden, tensors.teacher
    token_weight, labels = tensors.token_weight, tensors.labels
    student = Student(hidden.reshape(-1, hidden.shape[-1]), tensors.student_weight, tensors.student_bias)
    inputs = LossInputs(
        teacher,
        shard,
        device,
        accumulation_dtype(hidden, tensors.student_weight, *teacher.products.values()),
        autocast_dtype(hidden.device if hidden.device.type != "meta" else device),
        token_weight.detach().reshape(-1) if isinstance(token_weight, Tensor) else None,
        None if isinstance(token_weight, Tensor) else token_weight,
        {name: t.detach().reshape(-1) for name, t in (tensors.token_data or {}).items()},
        None if labels is None or config.hard_weight == 0 else labels.reshape(-1).long().contiguous(),
        _per_token(tensors.reverse_weight, hidden) if config.divergence == "mixed_kl" else None,
        valid_token_ids,
    )
    backend = choose_backend(config.backend, device, inputs.dtype)
    config = replace(config, backend=backend)
    row_loss = make_row_loss(backend, config, teacher.k, device.type)
    needs_grad = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in student)
    return ChunkLoop(student, inputs, config, row_loss, needs_grad)


def _per_token(value: float | Tensor, hidden: Tensor) -> Tensor:
    """Return a number or a tensor of the tokens' shape as (N,), as a view where it can be."""
    if not isinstance(value, Tensor):
        # Unlike torch.tensor, this copies nothing to a GPU, for which the host would wait.
        value = torch.full((), value, dtype=float64_if_supported(hidden.device), device=hidden.device)
    return value.detach().expand(hidden.shape[:-1]).reshape(-1)


def chunked_loss(
    student: Student,
    *,
    inputs: LossInputs,
    config: LossConfig,
    row_loss: RowLoss,
    divisor: float | Tensor | None,  # of each token's loss; None: 1
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
    if divisor is not None:  # of the weights, so that the gradients of a mean need no pass of their own
        share = torch.ones((), dtype=inputs.dtype, device=student.hidden.device) / divisor
        share = share.expand(len(student.hidden))
        token_weight = share if token_weight is None else share * token_weight.to(inputs.dtype)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        loop = ChunkLoop(student, inputs, config, row_loss, needs_grad)
        rows, gradients, grad_factor = loop.run(token_weight)
        to_tokens = partial(_scatter_to_tokens, inputs.valid_token_ids, len(student.hidden))
        loss = to_tokens(rows.loss) if per_token else rows.loss.sum()
        stats = None if rows.stats is None else rows.stats.map(to_tokens)
        return LossOutput(loss, stats, gradients, grad_factor)


def _scatter_to_tokens(valid_token_ids: Tensor | None, n_tokens: int, column: Tensor) -> Tensor:
    """Return (n,) values of the valid tokens as (N,), 0 elsewhere."""
    if valid_token_ids is None:
        return column
    return column.new_zeros(n_tokens).index_copy_(0, valid_token_ids, column)


@dataclass(frozen=True)
class ChunkLoop:
    """A call of a loss: its plan, and its computation."""

    student: Student
    inputs: LossInputs
    config: LossConfig  # with the chosen backend, not "auto"
    row_loss: RowLoss
    needs_grad: tuple[bool, ...]  # of hidden, weight, bias

    def plan(self, device_memory: int | None) -> tuple[CallMemory, ChunkPlan]:
        """Return memory and chunks of the call, which are the same on every rank of a process group."""
        inputs = self.inputs
        if inputs.shard.is_sharded:
            device_memory = None
        memory = call_memory(self.student, inputs, self.config, self.row_loss, self.needs_grad, device_memory)
        return memory, memory.plan(inputs.n_valid(self.student))

    def run(self, token_weight: Tensor | None) -> tuple[RowResult, Gradients, Tensor | None]:
        """Return losses and statistics of the n valid tokens, and gradients of their sum with a factor."""
        student, inputs, dtype, shard = self.student, self.inputs, self.inputs.dtype, self.inputs.shard
        memory, plan = self.plan(memory_of(inputs.device))
        columns = shard.student_size
        head = memory.head.over(student.weight[:columns])
        if head.dtype == torch.float16 and inputs.weight_function is not None and any(self.needs_grad):
            return self._with_weights_first(token_weight)
        bias = None if student.bias is None else student.bias[:columns].to(dtype).contiguous()
        gradients = self._empty_gradients(head.rows_written_by_first_chunk)
        grad_scale = self._grad_scale(head.dtype, token_weight)
        if token_weight is None:
            token_weight = torch.ones((), dtype=dtype, device=student.hidden.device)
            token_weight = token_weight.expand(len(student.hidden))

        rows = min(plan.rows, plan.n_tokens)
        use_kernels = self.config.backend == "triton"
        read_teacher = inputs.teacher.reader(shard, rows, dtype, memory.teacher_head, use_kernels=use_kernels)
        logits = logit_buffer(rows, head.n_logits, dtype, student.hidden.device)
        grad_buffer = None
        if memory.has_grad_buffer:
            grad_rows = min(plan.grad_buffer_rows, plan.n_tokens)
            grad_buffer = logit_buffer(grad_rows, head.n_logits, head.dtype, student.hidden.device)

        config, results = self.config, list[RowResult]()
        if inputs.weight_function is not None:
            config = replace(config, return_stats=True)
        for part in plan.grad_chunks():
            tokens = self._positions(part)
            hidden = student.hidden[tokens].to(head.dtype)
            grad = None if grad_buffer is None else grad_buffer[: len(hidden)]
            for chunk in plan.chunks(part):
                teacher_rows = read_teacher(self._positions(chunk))
                if isinstance(head, IndexedLMHead) and teacher_rows.ids is not None:
                    head = head.at(teacher_rows.ids, plan.block_rows)
                in_part = slice(chunk.start - part.start, chunk.stop - part.start)
                projected = head.project(hidden[in_part], logits[: chunk.stop - chunk.start])
                if grad_buffer is None and any(self.needs_grad):
                    grad = projected
                results.append(
                    self.row_loss(
                        self._student_rows(chunk, projected, bias, token_weight, grad_scale),
                        teacher_rows,
                        config,
                        grad=grad if grad_buffer is None else grad_buffer[in_part],
                        group=shard.group,
                        block_rows=plan.block_rows,
                    )
                )
            if grad is not None:
                _accumulate(gradients, grad, head, hidden, tokens, first=part.start == 0)
        if gradients.hidden is not None:
            shard.group.all_reduce_sum_(gradients.hidden)
        factor = None if grad_scale is None else grad_scale.reciprocal()
        rows_of_call = RowResult.concatenate(results)
        if not self.config.return_stats:
            rows_of_call = rows_of_call._replace(stats=None)
        return rows_of_call, gradients, factor

    def _with_weights_first(self, token_weight: Tensor | None) -> tuple[RowResult, Gradients, Tensor | None]:
        """Compute the statistics of all tokens, then their weights, then the loss with those weights.

        Float16 gradients take this way, because their scale depends on the largest weight of the call.
        """
        constant = replace(self, inputs=replace(self.inputs, weight_function=None, token_data={}))
        config = replace(self.config, return_stats=True)
        rows, _, _ = replace(constant, config=config, needs_grad=(False,) * 3).run(None)
        assert rows.stats is not None
        weight = self.inputs.weigh(rows.stats, self._positions(slice(None)))
        weight = _scatter_to_tokens(self.inputs.valid_token_ids, len(self.student.hidden), weight)
        return constant.run(weight if token_weight is None else weight * token_weight)

    def _grad_scale(self, product_dtype: torch.dtype, token_weight: Tensor | None) -> Tensor | None:
        """Return the power of two that the logit gradients are multiplied by; None: 1."""
        if product_dtype != torch.float16 or not any(self.needs_grad):
            return None
        tokens = self._positions(slice(None))
        weight = None if token_weight is None else token_weight[tokens].to(self.inputs.dtype)
        if isinstance(self.inputs.teacher, TopKTeacher):
            excess = excess_over_bound(self.config, self.inputs.teacher.logprobs[tokens])
            weight = excess if weight is None else weight if excess is None else weight * excess
        return float16_grad_scale(self.config, weight, self.student.hidden.device)

    def _positions(self, chunk: slice) -> slice | Tensor:
        """Return where a chunk of the valid tokens is among all tokens."""
        valid = self.inputs.valid_token_ids
        return chunk if valid is None else valid[chunk]

    def _student_rows(
        self,
        chunk: slice,
        logits: Tensor,
        bias: Tensor | None,
        token_weight: Tensor,
        grad_scale: Tensor | None,
    ) -> StudentRows:
        inputs, tokens, mix = self.inputs, self._positions(chunk), self.inputs.reverse_weight
        # Kernels read vectors as contiguous, and a fixed layout avoids recompilation.
        weight = token_weight[tokens].to(inputs.dtype).contiguous()
        return StudentRows(
            logits,
            weight,
            bias,
            None if inputs.labels is None else inputs.shard.local_labels(inputs.labels[tokens]),
            None if grad_scale is None else weight * grad_scale,
            None if mix is None else mix[tokens].to(inputs.dtype).contiguous(),
            None if inputs.weight_function is None else partial(inputs.weigh, tokens=tokens),
        )

    def _empty_gradients(self, rows_written_by_first_chunk: int) -> Gradients:
        """Return the buffers that `_accumulate` fills; zeros where it does not write."""
        student, dtype = self.student, self.inputs.dtype
        hidden, weight, bias = self.needs_grad
        gradients = Gradients(
            in_huge_pages(torch.empty_like(student.hidden, dtype=dtype)) if hidden else None,
            in_huge_pages(torch.empty_like(student.weight, dtype=dtype)) if weight else None,
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
