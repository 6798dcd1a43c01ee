"""Fused linear + generalized Jensen-Shannon divergence for a full-vocabulary teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Unpack

from . import reference
from ._module import LossModule
from .chunked.autograd import Call, fused_loss
from .chunked.loop import LossTensors
from .chunked.teacher import FullTeacher
from .config import LossSettings
from .parallel.dtensor import whole
from .parallel.vocab_shard import Vocabulary
from .rows.backend import full_backend
from .validation import (
    LossOptions,
    check_hidden_and_head,
    check_labels,
    check_normalizer,
    check_options,
    check_student,
    check_tokens,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    process_group: ProcessGroup | None = None,
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
        process_group: ranks that share the vocabulary (tensor parallelism). Each gives its block of rows of
            both heads and biases, blocks in the order of ranks, of any sizes, both models cut at the same
            rows. All else is the same on every rank; vocab_size and labels count over all blocks. Loss and
            statistics are the same on every rank. So is student_hidden's gradient: it is the sum over ranks
            already and must not be reduced again. The heads' gradients are the own block's. Every rank makes
            the call and the backward pass. See docs/parallel.md. None: the heads are whole.

    A head or bias may be a DTensor, as under FSDP2: it is gathered once per call, and the gradients of the
    ranks, which have tokens of their own, are averaged into the shards, as FSDP2 does.

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
        process_group=process_group,
    )
    check_options(options, LossOptions)
    check_normalizer(normalizer, reduction)
    check_student(student_hidden, student_weight, student_bias)
    device, shape = student_hidden.device, student_hidden.shape[:-1]
    check_hidden_and_head("teacher_", teacher_hidden, teacher_weight, teacher_bias, device)
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            "teacher_hidden must have the tokens of student_hidden, "
            f"got {tuple(teacher_hidden.shape)} and {tuple(student_hidden.shape)}"
        )
    check_tokens(shape, device, mask, token_weight)
    vocabulary = Vocabulary.of(
        process_group,
        vocab_size,
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_weight=teacher_weight,
        mask=mask,
        workspace_bytes=workspace_bytes,
    )
    check_labels(labels, hard_weight, shape, device, vocabulary.total)
    student_weight, student_bias = whole(student_weight), whole(student_bias)
    teacher_weight = whole(teacher_weight.detach())
    teacher_bias = None if teacher_bias is None else whole(teacher_bias.detach())

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
    teacher = FullTeacher(
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight,
        teacher_bias,
    )
    tensors = LossTensors.flattened(
        student_hidden,
        student_weight,
        student_bias,
        teacher,
        token_weight=token_weight,
        labels=labels if hard_weight != 0 else None,
        mask=mask,
    )
    return fused_loss(
        tensors,
        Call(
            LossSettings.of(options),
            full_backend,
            backend,
            vocabulary,
            shape,
            reduction,
            normalizer,
            workspace_bytes,
            return_stats,
        ),
    )


class FusedLinearJSDLoss(LossModule):
    """`fused_linear_jsd` as a module: settings at construction, tensors at the call.

    Example:
        >>> loss_fn = FusedLinearJSDLoss(beta=0.5, temperature=0.9)
        >>> loss = loss_fn(student_hidden, student_head, teacher_hidden, teacher_head, mask=completion_mask)

    Raises:
        ValueError, TypeError: an option that does not fit, by name.
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__(options, LossOptions)

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
