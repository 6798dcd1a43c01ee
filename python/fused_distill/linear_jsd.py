"""Fused linear + generalized Jensen-Shannon divergence for a full-vocabulary teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from .arguments import JSDKeywords, tensors_from
from .chunked.loop import fused_loss
from .chunked.teacher import FullTeacher
from .config import Backend, Divergence, LossConfig, Reduction, Surplus, config_from, keywords_of
from .stats import DistillStats, WeightFunction
from .tracing import untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


# fmt: off
@overload
def fused_linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_stats: Literal[False] = ..., **options: Unpack[JSDKeywords],
) -> Tensor: ...
@overload
def fused_linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_stats: Literal[True], **options: Unpack[JSDKeywords],
) -> tuple[Tensor, DistillStats]: ...
@overload
def fused_linear_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    return_stats: bool = ..., **options: Unpack[JSDKeywords],
) -> Tensor | tuple[Tensor, DistillStats]: ...
# fmt: on
@untraced
def fused_linear_jsd(
    student_hidden: Tensor,  # (..., Ds) float32 / bfloat16 / float16 / float64
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    divergence: Divergence = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float | Tensor = 0.5,  # or (...)
    entry_clip: float | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
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
    """Compute the divergence of student and teacher next-token distributions without storing their logits.

    p_s and p_t are the student's and the teacher's softmax of
    softcap(scale * (hidden @ weight.T + bias)) / temperature. The loss per token is
    `soft_weight * D(p_t, p_s) + hard_weight * cross_entropy(label)` with

        D = KL(p_t || p_s)                                          for beta = 0, forward KL
        D = KL(p_s || p_t)                                          for beta = 1, reverse KL
        D = beta KL(p_t || m) + (1 - beta) KL(p_s || m)             for 0 < beta < 1,
            with m = beta p_t + (1 - beta) p_s

    (Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649). The other
    choices of `divergence` are

        "skew_forward_kl"   D = KL(p_t || alpha p_t + (1 - alpha) p_s)
        "skew_reverse_kl"   D = KL(p_s || alpha p_s + (1 - alpha) p_t)
        "mixed_kl"          D = (1 - reverse_weight) KL(p_t || p_s) + reverse_weight KL(p_s || p_t)
        "total_variation"   D = 0.5 sum |p_t - p_s|

    (skewed KL: Ko et al., DistiLLM, https://arxiv.org/abs/2402.03898). docs/divergences.md compares them.
    With `entry_clip` = c each vocabulary entry's term of D, e.g. p_t log(p_t / p_s), is replaced by
    min(term, c), and a clipped term has no gradient. This is a surrogate, not a divergence: it may be
    negative, and it is not 0 for equal models alone. The loss is
    not rescaled by temperature**2. The gradient is computed in the forward pass, chunk by chunk, and scaled
    in the backward pass. A second backward pass through a retained graph recomputes it. Only student_hidden,
    student_weight and student_bias receive gradients. Logits, losses and accumulated gradients are float32
    (float64 if hidden states or a weight are float64). For half-precision inputs on a GPU the logit gradient
    is rounded once to the compute dtype before the two backward products.

    Args:
        student_hidden: (..., Ds) last hidden states of the student, one per token. This and the other float
            tensors may be float32, bfloat16, float16 or float64.
        student_weight: (Vs, Ds) weight of the student's LM head.
        teacher_hidden: (..., Dt) last hidden states of the teacher at the same tokens; Dt may differ from Ds.
        teacher_weight: (Vt, Dt) weight of the teacher's LM head; Vt may differ from Vs, see vocab_size.
        mask: (...) bool, True for valid tokens, which count in the loss. Masked tokens are skipped: no
            compute, and NaN there is ignored. None: all tokens are valid.
        student_bias: (Vs,) bias of the student's LM head.
        teacher_bias: (Vt,) bias of the teacher's LM head.
        divergence: "jsd", "skew_forward_kl", "skew_reverse_kl", "mixed_kl" or "total_variation", see above.
        beta: in [0, 1], of "jsd", see above.
        alpha: in [0, 1), of the skewed KL divergences, the share of the first model in the mixture. 0 gives
            the forward or the reverse KL.
        reverse_weight: in [0, 1], the weight of the reverse KL in "mixed_kl": a number, or a float tensor
            that is 0-d or has the shape (...) of the tokens. It receives no gradient. A tensor's values are
            checked on a CPU only.
        entry_clip: > 0, see above. None: no bound. It goes without surplus="count".
        temperature: > 0, divides both models' logits.
        student_logit_scale: > 0, multiplies the student's logits before the softcap.
        teacher_logit_scale: > 0, multiplies the teacher's logits before the softcap.
        student_softcap: > 0, turns the student's logits into softcap * tanh(logits / softcap). None: no
            softcap.
        teacher_softcap: > 0, the same for the teacher's logits.
        token_weight: (...) multiplies each token's loss; it receives no gradient. It may be a function that
            returns these weights, e.g. `lambda stats: (stats.teacher_entropy < 2.0).float()`. It is called
            under no_grad for one chunk after another, with the `DistillStats` of the chunk's n valid tokens,
            (n,) each and in order, and returns (n,) weights. It must give the same weights for the same
            tokens, because a second pass calls it again. It costs no further product, except that with
            float16 products on a GPU the logits are computed twice.
        token_data: tensors of shape (...) by name, which a function token_weight receives by keyword, as (n,)
            entries of its tokens: `token_weight=lambda stats, position: ...` with {"position": positions}.
        labels: (...) token ids below vocab_size for the cross entropy at temperature 1; -100 means no label.
            Those of masked tokens are ignored.
        hard_weight: >= 0, weight of the cross entropy; with 0, the default, labels have no effect.
        soft_weight: >= 0, weight of the divergence.
        vocab_size: compare only the first vocab_size columns, in the cross entropy too. None: min(Vs, Vt).
        surplus: what becomes of the student's rows from vocab_size on. "ignore": they do not exist for the
            loss, and a student that gives them all its probability has loss 0. "count": they take part in the
            student's softmax, and together they are one more outcome, whose student probability P is their
            sum and whose teacher probability is 0. Forward KL grows by -log(1 - P), a mixture grows too. In
            reverse KL, which would be infinite, the teacher's probability of the outcome is 1e-7, as for a
            tail in `fused_linear_topk_jsd`. See docs/divergences.md. "count" goes without process_group.
        reduction: "mean" over valid tokens, "sum", or "none". "none" returns the shape (...), 0 where masked;
            its backward pass recomputes the forward pass, because the upstream gradient is per token.
        normalizer: > 0, number or 0-d tensor, divisor for reduction="mean" (default: number of valid tokens).
            Set it to the step's token count under gradient accumulation. A 0-d tensor may be 0 if no token is
            valid. Its value is checked on a CPU only: on a GPU, where the host would wait for it, 0 with
            valid tokens gives an infinite or NaN loss.
        workspace_bytes: bound on temporary memory in bytes. The gradients, accumulated in float32, are not
            included. None: on a GPU the float32 size of the student head, but from a fortieth to a sixteenth
            of the device's memory and at least 1 GiB, plus copies of heads that must be converted; on a CPU
            twice that size, at least 256 MiB.
        backend: "auto", "triton", "cpp" (C++ on a CPU, compiled when first used), "torch" or "reference".
            "auto" is "triton" on a CUDA or ROCm device in float32, "cpp" on a CPU with a C++ compiler, and
            "torch" otherwise and under torch.export.
        return_stats: also return a `DistillStats` of the valid tokens.
        process_group: ranks that share the vocabulary (tensor parallelism). Each rank passes its shard of the
            vocabulary rows of both heads and biases (rank order, sizes may differ; student and teacher
            sharded at the same boundaries). All other arguments must be identical on every rank; vocab_size
            and labels count over all shards. Loss, statistics and the gradient of student_hidden are equal on
            every rank. The latter is already summed over the ranks and must not be reduced again. The heads'
            gradients are those of the local shard. Every rank must make the call and the backward pass. See
            docs/parallel.md. None: the heads are not sharded.

    Without process_group, a head or bias may be a DTensor, as under FSDP2. It is gathered once per call; the
    full tensor is not included in workspace_bytes. Each rank has its own tokens, and the ranks' gradients are
    averaged into the shards, as FSDP2 does.

    Returns:
        The loss in nats, 0-d or (...), float32, or float64 if hidden states or a weight are float64; with
        return_stats, (loss, DistillStats). If no token is valid, the loss and all gradients are 0.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it).
        ImportError: backend="triton" without Triton.
        RuntimeError: backend="cpp" where its C++ cannot be compiled, the loss is differentiated twice, or a
            backward pass that recomputes the forward pass finds a tensor that has been changed in place.
    """
    arguments = locals()
    return fused_loss(tensors_from(FullTeacher, arguments), config_from(LossConfig, arguments))


class FusedLinearJSDLoss(nn.Module):
    """`fused_linear_jsd` as a module: options at construction, tensors at the call.

    The options are the keyword arguments of `fused_linear_jsd` that `forward` does not take.

    Example:
        >>> loss_fn = FusedLinearJSDLoss(beta=0.5, temperature=0.9)
        >>> loss = loss_fn(student_hidden, student_head, teacher_hidden, teacher_head, mask=mask)

    Raises:
        ValueError, TypeError: an option is invalid (the message names it).
    """

    @keywords_of(LossConfig)
    def __init__(self, **options: Any):
        super().__init__()
        self.config = LossConfig(**options)

    @untraced
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
        token_weight: Tensor | WeightFunction | None = None,  # (...)
        token_data: Mapping[str, Tensor] | None = None,  # (...) each
        labels: Tensor | None = None,  # (...)
        reverse_weight: float | Tensor = 0.5,  # or (...)
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DistillStats]:
        """Return the loss, or (loss, DistillStats) with return_stats; see `fused_linear_jsd`."""
        return fused_loss(tensors_from(FullTeacher, locals()), self.config)

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults."""
        return self.config.changed_fields()
