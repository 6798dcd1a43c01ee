"""Log-probabilities of a model's most likely tokens and of chosen tokens, without storing its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked.gemm import accumulation_dtype, autocast_dtype, float64_if_supported
from .chunked.lm_head import LMHead, logit_buffer
from .chunked.workspace import Workspace, default_workspace_bytes, plan_chunks
from .config import LossConfig, Scalars, require_integer, require_positive, require_positive_or_none
from .parallel.dtensor import gather_dtensor
from .parallel.vocab_shard import compared_columns
from .rows.backend import auto_backend
from .rows.elementwise import exp_sub_max
from .rows.support import student_transform
from .tracing import check_has_data, untraced
from .validation import check_float, check_hidden_and_head, check_id_range, check_ids, check_tokens


class TopKLogprobs(NamedTuple):
    """Results of `topk_logprobs`; the first two are teacher arguments of `fused_linear_topk_jsd`."""

    logprobs: Tensor  # (..., k) float32 (float64 for float64 inputs), descending; -inf where masked
    ids: Tensor  # (..., k) int64; 0 where masked
    actual_logprobs: Tensor | None  # float, in the shape of actual_ids; -inf where masked


@untraced
@torch.no_grad()
def topk_logprobs(
    hidden: Tensor,  # (..., D) float32 / bfloat16 / float16 / float64
    weight: Tensor,  # (V, D)
    k: int,
    actual_ids: Tensor | None = None,  # (...) or (..., M) int64 / int32
    *,
    bias: Tensor | None = None,  # (V,)
    mask: Tensor | None = None,  # (...) bool
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
) -> TopKLogprobs:
    """Return the k largest log-probabilities per token, and those of chosen tokens, without storing logits.

    The log-probabilities are log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature).
    For a teacher these are the teacher arguments of `fused_linear_topk_jsd`; for a student they are the
    student's own support. Logits are float32 products, computed chunk by chunk. Log-probabilities are rounded
    once. There is no gradient.

    Args:
        hidden: (..., D) last hidden states, one per token.
        weight: (V, D) weight of the LM head. A DTensor, as under FSDP2, is gathered once per call, as is
            bias.
        k: number of tokens per position, 0 to V.
        actual_ids: (...) or (..., M) one or M further tokens per position whose log-probabilities are
            returned.
        bias: (V,) bias of the LM head.
        mask: (...) bool, True at the positions to compute. None: all positions.
        temperature: > 0, divides the logits.
        logit_scale: > 0, multiplies the logits before the softcap.
        softcap: > 0, turns the logits into softcap * tanh(logits / softcap). None: no softcap.
        vocab_size: the vocabulary is the first vocab_size columns. None: V.
        workspace_bytes: bound on temporary memory in bytes. Not included are the results and, for the tokens
            of a chunk, temporaries of size k + M per token. None: as in `fused_linear_jsd`.

    Returns:
        `TopKLogprobs`.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it). An actual id outside the
            vocabulary is reported as in `fused_linear_topk_jsd`.
    """
    check_has_data("hidden", hidden, mask)
    device, shape = check_float("hidden", hidden).device, hidden.shape[:-1]
    check_hidden_and_head("", hidden, weight, bias, device)
    require_positive("logit_scale", logit_scale)
    require_positive_or_none("softcap", softcap)
    config = LossConfig(
        temperature=temperature,
        student_logit_scale=logit_scale,
        student_softcap=softcap,
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
    )
    n_columns = compared_columns(config.vocab_size, {"weight": weight})
    k = require_integer("k", k)
    if not 0 <= k <= n_columns:
        raise ValueError(f"k must be between 0 and the vocabulary size {n_columns}, got {k}")
    check_tokens(shape, device, mask, None)
    actual = torch.empty(*shape, 0, dtype=torch.int64, device=device)
    if actual_ids is not None:
        check_ids("actual_ids", actual_ids, device)
        if actual_ids.shape[: len(shape)] != shape or actual_ids.dim() > len(shape) + 1:
            raise ValueError(
                f"actual_ids must have the shape of the tokens, {tuple(shape)}, or one dimension more, "
                f"got {tuple(actual_ids.shape)}"
            )
        actual = actual_ids if actual_ids.dim() > len(shape) else actual_ids.unsqueeze(-1)
        check_id_range("actual_ids", actual, n_columns, mask=mask)

    weight = gather_dtensor(weight)
    dtype = accumulation_dtype(hidden, weight)
    head = LMHead.for_inputs(hidden, weight[:n_columns], dtype, autocast_dtype(device))
    bias = None if bias is None else gather_dtensor(bias)[:n_columns].to(dtype)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    actual = actual.reshape(len(hidden), actual.shape[-1]).long()
    valid_token_ids = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    n_tokens = len(hidden) if valid_token_ids is None else len(valid_token_ids)

    logprobs = torch.full((len(hidden), k), -torch.inf, dtype=dtype, device=device)
    ids = torch.zeros(len(hidden), k, dtype=torch.int64, device=device)
    actual_logprobs = torch.full(actual.shape, -torch.inf, dtype=dtype, device=device)
    per_row = (2 * n_columns + hidden.shape[-1]) * dtype.itemsize + 512
    need = head.workspace() + Workspace(fixed=64 * len(hidden), per_row=per_row)
    bound = config.workspace_bytes or default_workspace_bytes(
        device.type, head.weight.numel() * dtype.itemsize
    )
    plan = plan_chunks(n_tokens, bound, need)
    buffer = logit_buffer(min(plan.rows, n_tokens), n_columns, dtype, device)
    backend, _ = auto_backend(device, dtype)
    logprobs_of = _logprobs_by_kernel if backend == "triton" else _logprobs_by_torch
    for chunk in plan.chunks():
        tokens = chunk if valid_token_ids is None else valid_token_ids[chunk]
        with torch.autocast(device.type, enabled=False):
            logits = head.project(hidden[tokens].to(head.dtype), buffer[: chunk.stop - chunk.start])
        if bias is not None:
            logits += bias
        logp, ids[tokens] = logprobs_of(logits, k, actual[tokens], config)
        logprobs[tokens], actual_logprobs[tokens] = logp[:, :k], logp[:, k:]
    return TopKLogprobs(
        logprobs.reshape(*shape, k),
        ids.reshape(*shape, k),
        None if actual_ids is None else actual_logprobs.reshape(actual_ids.shape),
    )


# The largest exponential is 1 and is left out of the sum of exponentials: for a confident model all other
# tokens may sum to 1e-9.


def _logprobs_by_torch(
    logits: Tensor,  # (n, V), overwritten
    k: int,
    actual: Tensor,  # (n, M)
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (n, k + M) of the k most likely and the actual tokens, and ids (n, k)."""
    scalars = Scalars(*config.scalars(logits.dtype).unbind())
    scale, softcap = scalars.student_logit_scale, scalars.student_softcap
    if config.student_softcap is not None:
        logits.mul_(scale / softcap).tanh_().mul_(softcap * scalars.inv_temperature)
    elif config.student_logit_scale != 1 or config.temperature != 1:
        logits.mul_(scale * scalars.inv_temperature)
    values, ids = logits.topk(k, dim=-1)
    values = torch.cat([values, logits.gather(-1, actual)], -1)
    max_logit, column = logits.max(-1, keepdim=True)
    others = logits.scatter_(-1, column, -torch.inf).sub_(max_logit).exp_().sum(-1, keepdim=True)
    wide = float64_if_supported(logits.device)
    return ((values.to(wide) - max_logit) - others.to(wide).log1p()).to(logits.dtype), ids


def _logprobs_by_kernel(
    logits: Tensor,  # (n, V) float32
    k: int,
    actual: Tensor,  # (n, M)
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Return the same as `_logprobs_by_torch`, after one pass over the logits besides that of the top-k."""
    from fused_distill_kernels import tail_sums  # needs Triton

    values, ids = logits.topk(max(k, 1), dim=-1)  # the first is the maximum
    parts = tail_sums(logits, config, bias=None, want_y=False)
    maxima, others = parts[:, 0], parts[:, 1]
    top, part = maxima.max(-1, keepdim=True)
    of_part = exp_sub_max(maxima, top)
    others = (others * of_part).sum(-1, keepdim=True) + of_part.scatter(-1, part, 0.0).sum(-1, keepdim=True)
    columns = [values[:, :1], values[:, :k], logits.gather(-1, actual)]
    y, _ = student_transform(torch.cat(columns, -1).double(), None, config)
    z = y / config.temperature
    return ((z[:, 1:] - z[:, :1]) - others.log1p()).to(logits.dtype), ids[:, :k]
