"""Fused linear + generalized Jensen-Shannon divergence for a teacher known only at K tokens per position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from .arguments import TopKJSDKeywords, tensors_from
from .chunked.loop import fused_loss
from .chunked.teacher import TopKTeacher
from .config import Backend, Divergence, Reduction, Surplus, Tail, TopKLossConfig, config_from, keywords_of
from .stats import DistillStats, WeightFunction
from .tracing import untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


# fmt: off
@overload
def fused_linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    return_stats: Literal[False] = ..., **options: Unpack[TopKJSDKeywords],
) -> Tensor: ...
@overload
def fused_linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    return_stats: Literal[True], **options: Unpack[TopKJSDKeywords],
) -> tuple[Tensor, DistillStats]: ...
@overload
def fused_linear_topk_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, *,
    return_stats: bool = ..., **options: Unpack[TopKJSDKeywords],
) -> Tensor | tuple[Tensor, DistillStats]: ...
# fmt: on
@untraced
def fused_linear_topk_jsd(
    student_hidden: Tensor,  # (..., Ds) float32 / bfloat16 / float16 / float64
    student_weight: Tensor,  # (Vs, Ds)
    teacher_logprobs: Tensor,  # (..., K) float, -inf where absent
    teacher_ids: Tensor,  # (..., K) int64 / int32
    *,
    tail: Tail = "bucket",
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    divergence: Divergence = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float | Tensor = 0.5,  # or (...)
    entry_clip: float | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_weight: Tensor | WeightFunction | None = None,  # (...) float
    token_data: Mapping[str, Tensor] | None = None,  # (...) each
    labels: Tensor | None = None,  # (...) int64 / int32
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    vocab_size: int | None = None,
    surplus: Surplus = "ignore",
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, DistillStats]:
    """Compute the divergence between the student and a teacher known only at K tokens per position.

    p_s is the student's softmax over the vocabulary, and p_t are the teacher's given probabilities. The tail
    is everything outside the K ids. The divergence D of `fused_linear_jsd` is taken over

        "bucket"       K + 1 outcomes: the K ids and the tail, whose probability is 1 - the sum over the ids.
                       A lower bound on the full divergence (the teacher's tail mass is clamped to >= 1e-7),
                       and 0 where the student has no other token (K = V).
        "renormalize"  K outcomes; both models are divided by their sum over the K ids. Only the K columns of
                       each token are projected, without a product over the vocabulary. Ignores the student's
                       mass outside the K ids, and is always 0 for one id.
        "truncate"     the K ids' terms of D without normalization, for a mixture beta p_t log(p_t / m) +
                       (1 - beta) p_s log(p_s / m). This is not a divergence: it may be negative.

    With the completion's own token as the only id, "bucket" and beta = 1 give reverse KL over that token and
    the tail, which is the loss of TRL's ServerDistillationTrainer. Everything else is as in
    `fused_linear_jsd`, which cites the paper.

    Args:
        student_hidden: (..., Ds) last hidden states of the student, one per token. This and the other float
            tensors may be float32, bfloat16, float16 or float64.
        student_weight: (Vs, Ds) weight of the student's LM head.
        teacher_logprobs: (..., K) natural logarithms of the teacher's probabilities at `temperature`. -inf
            marks an absent entry, and so does every number up to -9984, because a stock vLLM server writes
            -inf as -9999.0. The probabilities of a token sum to at most 1, but for rounding: 1.01, or 1.05
            for bfloat16, is accepted.
        teacher_ids: (..., K) token ids of teacher_logprobs, in any order; ignored at absent entries. An id
            that occurs twice for a token counts once, with its first entry. K may exceed the vocabulary.
        tail: how probability outside the K ids is treated, see above.
        mask: (...) bool, True for valid tokens, which count in the loss. None: all tokens are valid.
        student_bias: (Vs,) bias of the student's LM head.
        divergence: as in `fused_linear_jsd`. "truncate" goes with "jsd" only.
        beta: in [0, 1], of "jsd".
        alpha: in [0, 1), of the skewed KL divergences.
        reverse_weight: in [0, 1], a number, 0-d or (...), of "mixed_kl".
        entry_clip: > 0, bounds each outcome's term from above; see `fused_linear_jsd`. Not with "truncate".
        temperature: > 0, divides the student's logits.
        student_logit_scale: > 0, multiplies the student's logits before the softcap.
        student_softcap: > 0, turns the student's logits into softcap * tanh(logits / softcap). None: no
            softcap.
        token_weight: (...) multiplies each token's loss, or a function of the statistics, as in
            `fused_linear_jsd`. It receives no gradient.
        token_data: (...) tensors by name for a function token_weight, as in `fused_linear_jsd`.
        labels: (...) token ids for the cross entropy at temperature 1 over all columns; -100 means no label.
            Those of masked tokens are ignored.
        hard_weight: >= 0, weight of the cross entropy; with 0 labels have no effect. If it is not 0,
            "renormalize" projects the whole vocabulary.
        soft_weight: >= 0, weight of the divergence.
        vocab_size: the vocabulary is the first vocab_size columns. None: Vs.
        surplus: what becomes of the student's rows from vocab_size on. "ignore": they do not exist for the
            loss. "count": they take part in the student's softmax. They belong to the tail, so that
            "renormalize" ignores them, but not its cross entropy. teacher_ids and labels are still below
            vocab_size. See `fused_linear_jsd`.
        reduction: "mean" over valid tokens, "sum", or "none"; see `fused_linear_jsd`.
        normalizer: divisor for reduction="mean" (default: number of valid tokens); see `fused_linear_jsd`.
        workspace_bytes: bound on temporary memory in bytes, see `fused_linear_jsd`. Not included are the
            check of teacher_ids, 3 bytes per entry, and copies of teacher tensors that are not contiguous.
        backend: "auto", "triton", "cpp", "torch" or "reference", see `fused_linear_jsd`.
        return_stats: also return a `DistillStats` of the valid tokens.
        process_group: ranks that share the vocabulary. Each rank passes its shard of the rows of
            student_weight and student_bias; teacher_ids count over all shards. See `fused_linear_jsd`, for
            DTensors too.

    Returns:
        The loss in nats, 0-d or (...), float32, or float64 for a float64 student; with return_stats, (loss,
        DistillStats). If no token is valid, the loss and all gradients are 0.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it). An id outside the vocabulary
            whose entry is present, and a probability above 1, raise ValueError, except on a CUDA GPU: there
            it is a device-side assertion with the same message, as for an embedding, because reading it back
            would make the host wait. So do probabilities that sum to more than 1, which the Triton backend
            alone does not check.
        ImportError: backend="triton" without Triton.
        RuntimeError: backend="cpp" where its C++ cannot be compiled, the loss is differentiated twice, or a
            backward pass that recomputes the forward pass finds a tensor that has been changed in place.
    """
    arguments = locals()
    return fused_loss(tensors_from(TopKTeacher, arguments), config_from(TopKLossConfig, arguments))


class FusedLinearTopKJSDLoss(nn.Module):
    """`fused_linear_topk_jsd` as a module: options at construction, tensors at the call.

    The options are the keyword arguments of `fused_linear_topk_jsd` that `forward` does not take.

    Example:
        >>> loss_fn = FusedLinearTopKJSDLoss(beta=0.5, tail="bucket")
        >>> loss = loss_fn(student_hidden, student_head, logprobs, ids, mask=mask)

    Raises:
        ValueError, TypeError: an option is invalid (the message names it).
    """

    @keywords_of(TopKLossConfig)
    def __init__(self, **options: Any):
        super().__init__()
        self.config = TopKLossConfig(**options)

    @untraced
    def forward(
        self,
        student_hidden: Tensor,  # (..., Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_logprobs: Tensor,  # (..., K)
        teacher_ids: Tensor,  # (..., K)
        *,
        mask: Tensor | None = None,  # (...) bool
        student_bias: Tensor | None = None,  # (Vs,)
        token_weight: Tensor | WeightFunction | None = None,  # (...)
        token_data: Mapping[str, Tensor] | None = None,  # (...) each
        labels: Tensor | None = None,  # (...)
        reverse_weight: float | Tensor = 0.5,  # or (...)
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats]:
        """Return the loss, or (loss, DistillStats) with return_stats; see `fused_linear_topk_jsd`."""
        return fused_loss(tensors_from(TopKTeacher, locals()), self.config)

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults."""
        return self.config.changed_fields()
