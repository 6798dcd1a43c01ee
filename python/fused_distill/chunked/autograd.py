"""The autograd Function of all losses. It saves and returns; `chunked.loop` computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..stats import DistillStats
from .versions import InputVersions


class Student(NamedTuple):
    """The tensors that may receive gradients."""

    hidden: Tensor  # (N, Ds)
    weight: Tensor  # (Vs, Ds)
    bias: Tensor | None  # (Vs,)


class Gradients(NamedTuple):
    """Gradients of the summed loss in the accumulation dtype; None where not needed."""

    hidden: Tensor | None = None  # (N, Ds)
    weight: Tensor | None = None  # (Vs, Ds)
    bias: Tensor | None = None  # (Vs,)


class LossOutput(NamedTuple):
    """Results of one pass over the tokens."""

    loss: Tensor  # (N,) weighted losses per token, 0 where masked, or their sum
    stats: DistillStats | None  # (N,) each
    gradients: Gradients
    grad_factor: Tensor | None = None  # 0-d, multiplies the gradients; None: 1


class FusedLoss(torch.autograd.Function):
    """The summed loss, whose gradients forward computes, or per-token losses, whose gradients backward does.

    A second backward pass through a retained graph computes the gradients of the summed loss again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., LossOutput],  # `chunked.loop.chunked_loss` with its constants bound
        per_token: bool,
        needs_grad: tuple[bool, ...],  # of hidden, weight, bias
        constants: Mapping[str, Tensor | None],  # the other tensors of the loss, by argument name
        *student: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return the loss, and the columns of its statistics if the options ask for them."""
        inputs = Student(*cast("tuple[Any, ...]", student))
        output: LossOutput = compute(
            inputs, per_token=per_token, needs_grad=(False,) * 3 if per_token else needs_grad
        )
        ctx.compute, ctx.per_token, ctx.needs_grad = compute, per_token, needs_grad
        ctx.gradients = None if per_token else (output.gradients, output.grad_factor)
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        ctx.save_for_backward(*student)
        ctx.versions = InputVersions(constants)
        columns = output.stats or ()
        ctx.mark_non_differentiable(*(c for c in columns if c is not None))
        return output.loss, *columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of forward, or recompute them."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distill's losses cannot be differentiated twice (create_graph=True); "
                "backend='reference' can"
            )
        grad_loss = grad_outputs[0]
        computed, ctx.gradients = ctx.gradients, None
        if computed is None:  # per-token losses, or a second backward pass through a retained graph
            student = Student(*ctx.saved_tensors)  # raises an error if the graph was freed
            ctx.versions.check()
            output: LossOutput = ctx.compute(
                student,
                per_token=False,
                needs_grad=ctx.needs_grad,
                factor=grad_loss if ctx.per_token else None,
                return_stats=False,
            )
            computed = output.gradients, output.grad_factor
        if not _graph_is_retained():  # else the constants would live as long as the caller's loss does
            ctx.compute = ctx.versions = None
        gradients, scale = computed
        if not ctx.per_token:
            scale = grad_loss if scale is None else grad_loss * scale
            scale = None if _is_one_on_cpu(scale) else scale
        scaled = (_scale_gradient(g, scale, t) for g, t in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, None, *scaled


def _graph_is_retained() -> bool:
    """Return True unless the running backward pass frees its graph; True if this torch does not tell."""
    engine: Any = torch._C._autograd  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    retained = getattr(engine, "_get_current_graph_task_keep_graph", None)
    return retained is None or retained()


def _is_one_on_cpu(scale: Tensor) -> bool:
    """Return True if a factor on a CPU is 1. Elsewhere reading it would wait for the device."""
    return scale.device.type == "cpu" and scale.item() == 1


def _scale_gradient(
    gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """Return the accumulated gradient times scale in the input's dtype, in place where the dtype allows."""
    if gradient is None or dtype is None:
        return None
    if scale is None:
        return gradient.to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)
