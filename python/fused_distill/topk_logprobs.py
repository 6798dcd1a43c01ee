"""Log-probabilities of a model's most likely tokens, and of given ones, without its logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked.gemm import accumulation_dtype, autocast_dtype
from .chunked.lm_head import Head, logit_buffer
from .chunked.teacher import wide_dtype
from .chunked.workspace import default_workspace_bytes, plan_chunks
from .config import LossSettings
from .parallel.dtensor import whole
from .validation import (
    check_count,
    check_float,
    check_hidden_and_head,
    check_id_range,
    check_ids,
    check_positive,
    check_softcap,
    check_tokens,
    check_vocab_size,
)


class TopKLogprobs(NamedTuple):
    """What `topk_logprobs` gives, the order of `fused_linear_topk_jsd`'s teacher arguments first."""

    logprobs: Tensor  # (..., k) float32 (float64 for float64 inputs), descending; -inf where masked
    ids: Tensor  # (..., k) int64; 0 where masked
    actual_logprobs: Tensor | None  # like actual_ids, float; -inf where masked


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
    """The k largest entries of log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature).

    This is the teacher's side of `fused_linear_topk_jsd`; of the student it gives the student's own support.
    Logits are float32 products, chunk by chunk; log-probabilities are rounded once. No gradient.

    Args:
        hidden: (..., D) last hidden states, one per token.
        weight: (V, D) the output embedding. A DTensor, as under FSDP2, is gathered once per call, as is bias.
        k: how many tokens per position, 0 to V.
        actual_ids: (...) or (..., M) one or M tokens per position whose log-probabilities are wanted too.
        bias: (V,) bias of the output layer.
        mask: (...) bool, True where the position is wanted. None: all.
        temperature: > 0, divides the logits.
        logit_scale: > 0, multiplies the logits, before the softcap.
        softcap: logits become softcap * tanh(logits / softcap). None: no softcap.
        vocab_size: the first vocab_size columns are the vocabulary. None: V.
        workspace_bytes: bound on temporary memory beyond the results, k and M columns a token apart. None: as
            in `fused_linear_jsd`.

    Returns:
        `TopKLogprobs`.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, before any work; an actual id outside
            the vocabulary as in `fused_linear_topk_jsd`.
    """
    device, shape = check_float("hidden", hidden).device, hidden.shape[:-1]
    check_hidden_and_head("", hidden, weight, bias, device)
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    check_softcap("softcap", softcap)
    check_count("workspace_bytes", workspace_bytes)
    check_count("vocab_size", vocab_size)
    n_columns = check_vocab_size(vocab_size, weight=weight)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 0 <= k <= n_columns:
        raise ValueError(f"k must be between 0 and the vocabulary size {n_columns}, got {k}")
    check_tokens(shape, device, mask, None)
    if actual_ids is not None:
        check_ids("actual_ids", actual_ids, device)
        if actual_ids.shape[: len(shape)] != shape or actual_ids.dim() > len(shape) + 1:
            raise ValueError(
                f"actual_ids must have the shape of the tokens, {tuple(shape)}, or one dimension more, "
                f"got {tuple(actual_ids.shape)}"
            )
        check_id_range("actual_ids", _as_rows(actual_ids, len(shape)), n_columns, mask=mask)

    weight = whole(weight.detach())
    bias = None if bias is None else whole(bias.detach())
    settings = LossSettings(temperature=temperature, student_logit_scale=logit_scale, student_softcap=softcap)
    dtype = accumulation_dtype(hidden, weight)
    head = Head.of(hidden, weight[:n_columns], dtype, autocast_dtype(device))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _topk_logprobs(hidden, head, dtype, k, actual_ids, bias, mask, settings, workspace_bytes)


def _topk_logprobs(
    hidden: Tensor,
    head: Head,
    dtype: torch.dtype,
    k: int,
    actual_ids: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: LossSettings,
    workspace_bytes: int | None,
) -> TopKLogprobs:
    """`topk_logprobs` for checked arguments."""
    device, shape, n_columns = hidden.device, hidden.shape[:-1], head.n_columns
    hidden = hidden.reshape(-1, hidden.shape[-1])
    bias = None if bias is None else bias[:n_columns].to(dtype)
    counted = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    n_tokens = len(hidden) if counted is None else len(counted)
    actual = None
    if actual_ids is not None:
        actual = _as_rows(actual_ids, len(shape))
        actual = actual.reshape(len(hidden), actual.shape[-1]).long()

    logprobs = torch.full((len(hidden), k), -torch.inf, dtype=dtype, device=device)
    ids = torch.zeros(len(hidden), k, dtype=torch.int64, device=device)
    actual_logprobs = (
        None if actual is None else torch.full(actual.shape, -torch.inf, dtype=dtype, device=device)
    )
    plan = plan_chunks(
        n_tokens,
        workspace_bytes or default_workspace_bytes(device.type, head.weight.numel() * dtype.itemsize),
        fixed_bytes=head.fixed_bytes + 64 * len(hidden),
        row_bytes=head.row_bytes + 2 * n_columns * dtype.itemsize + hidden.shape[-1] * dtype.itemsize + 512,
        block_row_bytes=0,
        block_rows=1,
    )
    buffer = logit_buffer(min(plan.rows, n_tokens), n_columns, dtype, device)
    numbers = settings.as_tensor(dtype)
    _, _, inv_temperature, scale, _, cap, *_ = numbers.unbind()
    for chunk in plan.chunks():
        some = chunk if counted is None else counted[chunk]
        logits = head.project(hidden[some].to(head.dtype), buffer[: chunk.stop - chunk.start])
        if bias is not None:
            logits += bias
        if settings.student_softcap is not None:
            logits.mul_(scale / cap).tanh_().mul_(cap * inv_temperature)
        elif settings.student_logit_scale != 1 or settings.temperature != 1:
            logits.mul_(scale * inv_temperature)
        top, ids[some] = logits.topk(k, dim=-1)
        named = top if actual is None else torch.cat([top, logits.gather(-1, actual[some])], -1)
        # The largest apart, whose exponential is 1: a sure model's others may hold 1e-9 together.
        largest, place = logits.max(-1, keepdim=True)
        others = logits.scatter_(-1, place, -torch.inf).sub_(largest).exp_().sum(-1, keepdim=True)
        wide = wide_dtype(device)
        logp = ((named.to(wide) - largest) - others.to(wide).log1p()).to(dtype)
        logprobs[some] = logp[:, :k]
        if actual_logprobs is not None:
            actual_logprobs[some] = logp[:, k:]
    return TopKLogprobs(
        logprobs.reshape(*shape, k),
        ids.reshape(*shape, k),
        None if actual_logprobs is None or actual_ids is None else actual_logprobs.reshape(actual_ids.shape),
    )


def _as_rows(ids: Tensor, token_dimensions: int) -> Tensor:
    """(...) or (..., M) ids as (..., M)."""
    return ids if ids.dim() > token_dimensions else ids.unsqueeze(-1)
