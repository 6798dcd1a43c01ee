"""Fused linear + generalized Jensen-Shannon divergence for a full-vocabulary teacher."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import _check, reference
from ._backends import choose_backend
from ._check import LossOptions, check_options
from ._engine import Engine, LossTensors, accumulation_dtype
from ._settings import DistillStats, LossSettings


def fused_linear_jsd(
    student_hidden: Tensor,  # (..., Ds) float32 / bfloat16 / float16 / float64
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,  # (...) float
    labels: Tensor | None = None,  # (...) int64 / int32
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Any:
    """Divergence between student's and teacher's next-token distributions, without their logits in memory.

    With p_s and p_t the softmax of softcap(scale * (hidden @ weight.T + bias)) / temperature of either model,
    a token's loss is `soft_weight * D(p_t, p_s) + hard_weight * cross_entropy(label)` with

        D = KL(p_t || p_s)                                                    beta = 0, forward KL
        D = KL(p_s || p_t)                                                    beta = 1, reverse KL
        D = beta KL(p_t || m) + (1 - beta) KL(p_s || m),  m = beta p_t + (1 - beta) p_s     between them

    (Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649). Nothing is
    multiplied by temperature^2. The gradient is computed in the forward pass, chunk by chunk; the
    backward pass scales it. Gradients go to those of student_hidden, student_weight and student_bias that
    require them. Logits, losses and accumulated gradients are float32 (float64 where an input is float64).

    Args:
        student_hidden: (..., Ds) last hidden states of the student, one per token.
        student_weight: (Vs, Ds) the student's output embedding.
        teacher_hidden: (..., Dt) the teacher's at the same tokens; Dt may differ from Ds.
        teacher_weight: (Vt, Dt); Vt may differ from Vs, see vocab_size.
        mask: (...) bool, True where the token counts. Other tokens cost nothing, whatever they hold.
            None: all count.
        student_bias: (Vs,) bias of the student's output layer.
        teacher_bias: (Vt,) bias of the teacher's output layer.
        beta: in [0, 1], see above.
        temperature: > 0, divides both models' logits.
        student_logit_scale: > 0, multiplies the student's logits, before the softcap.
        teacher_logit_scale: > 0, multiplies the teacher's logits, before the softcap.
        student_softcap: the student's logits become softcap * tanh(logits / softcap). None: no softcap.
        teacher_softcap: the same for the teacher.
        token_weight: (...) multiplies each token's loss; no gradient goes to it.
        labels: (...) token ids below vocab_size for the cross entropy at temperature 1; -100: no label.
        hard_weight: >= 0, weight of the cross entropy.
        soft_weight: >= 0, weight of the divergence.
        vocab_size: only the first vocab_size columns are compared (and count for the cross entropy).
            None: min(Vs, Vt).
        reduction: "mean" over counted tokens, "sum", or "none". "none" gives the shape (...), 0 where masked,
            and computes everything again in the backward pass, as its gradient is not known before.
        normalizer: > 0, number or 0-d tensor that replaces the token count in "mean" (gradient accumulation).
        workspace_bytes: bound on temporary memory beyond the gradients, which are accumulated in float32.
            None: 1 GiB on a GPU; on the CPU 256 MiB, or half of a float32 student head if more.
        backend: "auto" ("triton" on a CUDA or ROCm device, else "torch"), "triton", "torch" or "reference".
        return_stats: also return a `DistillStats` of the counted tokens.

    Returns:
        The loss, 0-d or (...), float32 or float64; with return_stats, (loss, DistillStats).
        No counted token gives 0 and zero gradients.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, before any work.
        ImportError: backend="triton" without Triton.
        RuntimeError: when differentiated twice.
    """
    options = LossOptions(
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        vocab_size=vocab_size,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=backend,
        return_stats=return_stats,
    )
    check_options(**options)
    _check.check_normalizer(normalizer, reduction)
    _check.check_float("student_hidden", student_hidden)
    device, shape = student_hidden.device, student_hidden.shape[:-1]
    _check.check_hidden_and_head("student", student_hidden, student_weight, student_bias, device)
    _check.check_hidden_and_head("teacher", teacher_hidden, teacher_weight, teacher_bias, device)
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            "teacher_hidden must have the tokens of student_hidden, "
            f"got {tuple(teacher_hidden.shape)} and {tuple(student_hidden.shape)}"
        )
    n_columns = _check.check_vocab_size(vocab_size, student_weight, teacher_weight)
    if mask is not None:
        _check.check_mask(mask, shape, device)
    if token_weight is not None:
        _check.check_float("token_weight", token_weight)
        _check.check_per_token("token_weight", token_weight, shape, device)
    _check.check_labels(labels, hard_weight, shape, device, n_columns)

    if backend == "reference":
        return reference.linear_jsd(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            mask=mask,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            token_weight=token_weight,
            labels=labels,
            normalizer=normalizer,
            **options,
        )
    settings = LossSettings(
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
    )
    tensors = LossTensors(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        None if token_weight is None else token_weight.detach().reshape(-1),
        None if labels is None or hard_weight == 0 else labels.reshape(-1).long(),
        None if mask is None else mask.reshape(-1).nonzero().squeeze(1),
    )
    fused = _opaque_fused() if torch.compiler.is_compiling() else _fused
    return fused(
        tensors, settings, shape, n_columns, reduction, normalizer, workspace_bytes, backend, return_stats
    )


def _fused(
    tensors: LossTensors,
    settings: LossSettings,
    shape: torch.Size,
    n_columns: int,
    reduction: str,
    normalizer: float | Tensor | None,
    workspace_bytes: int | None,
    backend: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillStats]:
    """The chunked way, for checked and flattened tensors."""
    n_tokens = len(tensors.student_hidden) if tensors.counted is None else len(tensors.counted)
    inputs = (tensors.student_hidden, tensors.student_weight, tensors.student_bias)
    device = tensors.student_hidden.device
    engine = Engine(
        settings,
        choose_backend(backend, device, accumulation_dtype(tensors), n_tokens * n_columns),
        n_columns,
        needs_grad=tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs),
        autocast_dtype=torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else None,
        return_stats=return_stats,
        workspace_bytes=workspace_bytes,
    )
    loss, *columns = cast("tuple[Tensor, ...]", _FusedLoss.apply(engine, reduction == "none", *tensors))
    if reduction == "none":
        loss = loss.reshape(shape)
    elif reduction == "mean":
        loss = loss / (max(n_tokens, 1) if normalizer is None else normalizer)
    return (loss, DistillStats(*(c.reshape(shape) for c in columns))) if return_stats else loss


@lru_cache
def _opaque_fused() -> Any:
    """`_fused` as a graph break for compiled callers; made late, as it imports the whole compiler."""
    return torch.compiler.disable(_fused)


class _FusedLoss(torch.autograd.Function):
    """Sum of the tokens' losses with its gradient computed on the way, or each token's loss without."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, per_token: bool, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        tensors = LossTensors(*inputs)  # pyright: ignore[reportArgumentType]
        run = engine.without_grad() if per_token else engine
        loss, stats, gradients = run.run(tensors, tensors.token_weight)
        ctx.engine, ctx.per_token, ctx.gradients = engine, per_token, None if per_token else gradients
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
        ctx.save_for_backward(*inputs[:3])
        ctx.constants = inputs[3:]  # not saved: a teacher run in inference mode gives tensors that cannot be
        columns = () if stats is None else tuple(_to_all_tokens(c, tensors) for c in stats)
        ctx.mark_non_differentiable(*columns)
        return _to_all_tokens(loss, tensors) if per_token else loss.sum(), *columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_jsd cannot be differentiated twice (create_graph=True); backend='reference' can"
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
        return None, None, *scaled, *(None,) * (len(LossTensors._fields) - len(gradients))


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


class FusedLinearJSDLoss(nn.Module):
    """`fused_linear_jsd` as a module: settings at construction, tensors at the call.

    Example:
        >>> loss_fn = FusedLinearJSDLoss(beta=0.5, temperature=0.9)
        >>> loss = loss_fn(student_hidden, student_head, teacher_hidden, teacher_head, mask=completion_mask)

    Raises:
        ValueError, TypeError: an option that does not fit, by name.
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__()
        check_options(**options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,  # (..., Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_hidden: Tensor,  # (..., Dt)
        teacher_weight: Tensor,  # (Vt, Dt)
        *,
        mask: Tensor | None = None,  # (...) bool
        student_bias: Tensor | None = None,  # (Vs,)
        teacher_bias: Tensor | None = None,  # (Vt,)
        token_weight: Tensor | None = None,  # (...)
        labels: Tensor | None = None,  # (...)
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss, or (loss, DistillStats) with return_stats; see `fused_linear_jsd`."""
        return fused_linear_jsd(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            mask=mask,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            token_weight=token_weight,
            labels=labels,
            normalizer=normalizer,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options that were set."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
