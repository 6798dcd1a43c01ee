"""From checked tensors to a differentiable loss: the one autograd Function of all losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..config import LossSettings
from ..parallel.vocab_shard import Vocabulary
from ..rows.backend import choose_backend
from ..stats import DistillStats
from .gemm import autocast_dtype
from .loop import Backend, Engine, LossTensors


class Call(NamedTuple):
    """What a public function asks for, apart from tensors."""

    settings: LossSettings
    make_backend: Callable[[str, int, bool], Backend]  # from its name, the number of logits, whether sharded
    backend: str
    vocabulary: Vocabulary
    shape: torch.Size  # of the tokens
    reduction: str
    normalizer: float | Tensor | None
    workspace_bytes: int | None
    return_stats: bool
    support_size: int | None = None  # see Engine


def fused_loss(tensors: LossTensors, call: Call) -> Any:
    """The loss, or (loss, DistillStats); a graph break for compiled callers."""
    return (_opaque() if torch.compiler.is_compiling() else _fused_loss)(tensors, call)


@lru_cache
def _opaque() -> Any:
    """`_fused_loss` closed to the compiler; made late, as it imports all of it."""
    return torch.compiler.disable(_fused_loss)


def _fused_loss(tensors: LossTensors, call: Call) -> Tensor | tuple[Tensor, DistillStats]:
    device = tensors.student_hidden.device
    name = choose_backend(call.backend, device, tensors.accumulation_dtype)
    engine = Engine(
        call.settings,
        call.make_backend(
            name, tensors.n_counted * call.vocabulary.largest, call.vocabulary.group is not None
        ),
        call.vocabulary,
        needs_grad=tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[:3]),
        autocast_dtype=autocast_dtype(device),
        return_stats=call.return_stats,
        workspace_bytes=call.workspace_bytes,
        support_size=call.support_size,
    )
    result = _FusedLoss.apply(engine, call.reduction == "none", tensors[3:], *tensors[:3])
    loss, *columns = cast("tuple[Any, ...]", result)
    if call.reduction == "none":
        loss = loss.reshape(call.shape)
    elif call.reduction == "mean":
        loss = loss / (max(tensors.n_counted, 1) if call.normalizer is None else call.normalizer)
    if not call.return_stats:
        return loss
    return loss, DistillStats(*columns).map(lambda c: c.reshape(call.shape))


class _FusedLoss(torch.autograd.Function):
    """Sum of the tokens' losses with its gradient computed on the way, or each token's loss without."""

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, per_token: bool, constants: tuple[Any, ...], *student: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = LossTensors(*student, *constants)  # pyright: ignore[reportArgumentType]
        run = engine.without_grad() if per_token else engine
        loss, stats, gradients = run.run(tensors, tensors.token_weight)
        ctx.engine, ctx.per_token, ctx.gradients = engine, per_token, None if per_token else gradients
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        ctx.save_for_backward(*student)
        ctx.constants = constants  # not saved: a teacher run in inference mode gives tensors that cannot be
        columns = () if stats is None else stats.map(lambda c: _to_all_tokens(c, tensors))
        ctx.mark_non_differentiable(*(c for c in columns if c is not None))
        return _to_all_tokens(loss, tensors) if per_token else loss.sum(), *columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distill's losses cannot be differentiated twice (create_graph=True); "
                "backend='reference' can"
            )
        grad_loss = grad_outputs[0]
        gradients, ctx.gradients = ctx.gradients, None
        scale = None if ctx.per_token else grad_loss
        if gradients is None:  # reduction "none", or a second backward pass through a retained graph
            tensors = LossTensors(*ctx.saved_tensors, *ctx.constants)
            weight = tensors.token_weight
            if ctx.per_token:
                weight = grad_loss if weight is None else grad_loss * weight
            gradients = replace(ctx.engine, return_stats=False).run(tensors, weight)[2]
        scaled = (_finish(g, scale, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, *scaled


def _finish(gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The accumulated gradient times scale in the input's dtype, in place where the dtype allows."""
    if gradient is None or dtype is None:
        return None
    if scale is None:
        return gradient.to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


def _to_all_tokens(column: Tensor, tensors: LossTensors) -> Tensor:
    """(n,) values of the counted tokens as (N,), 0 elsewhere."""
    if tensors.counted is None:
        return column
    return column.new_zeros(len(tensors.student_hidden)).index_copy_(0, tensors.counted, column)
