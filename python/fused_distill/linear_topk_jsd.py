"""Fused linear + generalized Jensen-Shannon divergence for a teacher known at K tokens per position."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Unpack

from . import reference
from ._module import LossModule
from .chunked.autograd import Call, fused_loss
from .chunked.loop import LossTensors
from .chunked.teacher import TopKTeacher
from .config import LossSettings
from .parallel.dtensor import whole
from .parallel.vocab_shard import Vocabulary
from .rows.backend import topk_backend
from .validation import (
    TopKLossOptions,
    check_labels,
    check_normalizer,
    check_options,
    check_student,
    check_support,
    check_tokens,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_linear_topk_jsd(
    student_hidden: Tensor,  # (..., Ds) float32 / bfloat16 / float16 / float64
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K) float, -inf where absent
    teacher_ids: Tensor,  # (..., K) int64 / int32
    *,
    tail: str = "bucket",
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
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
    """Divergence between the student and a teacher of which K log-probabilities per token are known.

    With p_s the student's softmax over the vocabulary and p_t the teacher's given probabilities, D of
    `fused_linear_jsd` is taken over

        "bucket"       K + 1 outcomes, the last one everything else: rest = 1 - the sum over the K ids. Never
                       more than the full divergence, but for 1e-7 of mass, the least that the teacher's rest
                       counts as; 0 where the student has no other token (K = V).
        "renormalize"  K outcomes, both models divided by their sum over the K ids. Only the K columns of each
                       token are projected: no product over the vocabulary. Blind to the student's mass
                       outside; with one id always 0.
        "truncate"     the K ids' terms of D, as they are: for a mixture beta p_t log(p_t / m) +
                       (1 - beta) p_s log(p_s / m). Not a divergence: it may be negative.

    With the completion's own token as the only id, "bucket" and beta = 1 give reverse KL over that token and
    the rest, the loss of TRL's ServerDistillationTrainer. Everything else is as in `fused_linear_jsd`.

    Args:
        student_hidden: (..., Ds) last hidden states of the student, one per token.
        student_weight: (Vs, Ds) the student's output embedding.
        teacher_logprobs: (..., K) natural logarithms of the teacher's probabilities, taken at `temperature`;
            -inf marks an absent entry. They may sum to slightly more than 1 by rounding.
        teacher_ids: (..., K) their tokens, in any order; absent entries may hold anything. An id that occurs
            twice in a token counts once, by its first entry. K may exceed the vocabulary.
        tail: see above.
        mask: (...) bool, True where the token counts.
        student_bias: (Vs,) bias of the student's output layer.
        beta: in [0, 1].
        temperature: > 0, divides the student's logits.
        student_logit_scale: > 0, multiplies the student's logits, before the softcap.
        student_softcap: the student's logits become softcap * tanh(logits / softcap). None: no softcap.
        token_weight: (...) multiplies each token's loss; no gradient goes to it.
        labels: (...) token ids for the cross entropy at temperature 1, over all columns; -100: no label.
        hard_weight: >= 0, weight of the cross entropy. Not 0: "renormalize" projects the whole vocabulary.
        soft_weight: >= 0, weight of the divergence.
        vocab_size: the first vocab_size columns are the vocabulary. None: Vs.
        reduction: "mean" over counted tokens, "sum", or "none"; see `fused_linear_jsd`.
        normalizer: > 0, number or 0-d tensor that replaces the token count in "mean".
        workspace_bytes: bound on temporary memory beyond the gradients; see `fused_linear_jsd`. The check of
            teacher_ids, 3 bytes an entry, and copies of teacher tensors that are not contiguous come on top.
        backend: "auto", "triton", "torch" or "reference".
        return_stats: also return a `DistillStats` of the counted tokens.
        process_group: ranks that share the vocabulary. Each gives its block of rows of student_weight and
            student_bias; teacher_ids count over all blocks. See `fused_linear_jsd`, for DTensors too.

    Returns:
        The loss, 0-d or (...), float32 or, for a float64 student, float64; with return_stats,
        (loss, DistillStats).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, before any work. An id outside the
            vocabulary with a finite log-probability: a ValueError; on a CUDA GPU, where reading it back would
            make the host wait, a device-side assertion with the same words, as for an embedding.
        ImportError: backend="triton" without Triton.
        RuntimeError: when differentiated twice.
    """
    options = TopKLossOptions(
        tail=tail,
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        vocab_size=vocab_size,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        backend=backend,
        return_stats=return_stats,
        process_group=process_group,
    )
    check_options(options, TopKLossOptions)
    check_normalizer(normalizer, reduction)
    check_student(student_hidden, student_weight, student_bias)
    device, shape = student_hidden.device, student_hidden.shape[:-1]
    check_tokens(shape, device, mask, token_weight)
    vocabulary = Vocabulary.of(
        process_group,
        vocab_size,
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        mask=mask,
        workspace_bytes=workspace_bytes,
    )
    check_labels(labels, hard_weight, shape, device, vocabulary.total)
    check_support(teacher_logprobs, teacher_ids, shape, device, vocabulary.total, mask)
    student_weight, student_bias = whole(student_weight), whole(student_bias)

    if backend == "reference":
        return reference.linear_topk_jsd(
            student_hidden,
            student_weight,
            teacher_logprobs,
            teacher_ids,
            mask=mask,
            student_bias=student_bias,
            token_weight=token_weight,
            labels=labels,
            normalizer=normalizer,
            **options,
        )
    support_size = teacher_ids.shape[-1]
    gathered = tail == "renormalize" and hard_weight == 0
    tensors = LossTensors.flattened(
        student_hidden,
        student_weight,
        student_bias,
        TopKTeacher(
            teacher_logprobs.detach().reshape(-1, support_size),
            teacher_ids.reshape(-1, support_size),
            vocabulary,
        ),
        token_weight=token_weight,
        labels=labels if hard_weight != 0 else None,
        mask=mask,
    )
    return fused_loss(
        tensors,
        Call(
            LossSettings.of(options),
            partial(topk_backend, tail=tail, support_size=support_size, gathered=gathered),
            backend,
            vocabulary,
            shape,
            reduction,
            normalizer,
            workspace_bytes,
            return_stats,
            support_size if gathered else None,
        ),
    )


class FusedLinearTopKJSDLoss(LossModule):
    """`fused_linear_topk_jsd` as a module: settings at construction, tensors at the call.

    Example:
        >>> loss_fn = FusedLinearTopKJSDLoss(beta=0.5, tail="bucket")
        >>> loss = loss_fn(student_hidden, student_head, logprobs, ids, mask=completion_mask)

    Raises:
        ValueError, TypeError: an option that does not fit, by name.
    """

    def __init__(self, **options: Unpack[TopKLossOptions]):
        super().__init__(options, TopKLossOptions)

    def forward(
        self,
        student_hidden: Tensor,  # (..., Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_logprobs: Tensor,  # (..., K)
        teacher_ids: Tensor,  # (..., K)
        *,
        mask: Tensor | None = None,  # (...) bool
        student_bias: Tensor | None = None,  # (Vs,)
        token_weight: Tensor | None = None,  # (...)
        labels: Tensor | None = None,  # (...)
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss, or (loss, DistillStats) with return_stats; see `fused_linear_topk_jsd`."""
        return fused_linear_topk_jsd(
            student_hidden,
            student_weight,
            teacher_logprobs,
            teacher_ids,
            mask=mask,
            student_bias=student_bias,
            token_weight=token_weight,
            labels=labels,
            normalizer=normalizer,
            **self.options,
        )
