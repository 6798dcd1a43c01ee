"""Checks of tensor arguments: one clear error that names the argument, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import require_number
from .tracing import without_data

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED_LABEL = -100
DEFAULT_REVERSE_WEIGHT = 0.5

# A stock vLLM server writes -inf as -9999.0, which bfloat16 rounds to this.
FORBIDDEN_LOGPROB = -9984.0
# How far the probabilities of a top-k teacher may sum above 1: log-probabilities of size 10 that were rounded
# to float16 or bfloat16 sum to 1.004 or 1.03.
_ROUNDED_SUM = {torch.bfloat16: 0.05, torch.float16: 0.01}
_EXACT_SUM = 0.01


def check_normalizer(
    normalizer: float | Tensor | None, reduction: str, mask: Tensor | None, n_tokens: int
) -> None:
    """Require None, a positive number or a 0-d tensor, and only with reduction="mean".

    The value of a tensor is checked on a CPU alone, because reading it from a GPU would wait for it. It may
    be 0 where no token is valid, as the count of a step without valid tokens is.
    """
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'normalizer replaces the token count of reduction="mean", got reduction={reduction!r}'
        )
    if isinstance(normalizer, Tensor):
        if normalizer.is_complex():
            raise TypeError(f"normalizer must be a real number, got a tensor of {normalizer.dtype}")
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
            )
        if normalizer.device.type != "cpu" or without_data():
            return
        value = normalizer.item()
        if value == 0 and not (n_tokens if mask is None else bool(mask.any())):
            return
        if not 0 < value < math.inf:
            raise ValueError(f"normalizer must be positive and finite, got {value}")
    elif not require_number("normalizer", normalizer) > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")


def check_hidden_and_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device
) -> None:
    """Require hidden states (..., D), weight (V, D) and bias (V,) that fit each other, on `device`."""
    for name, tensor in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None and name == f"{prefix}bias":
            continue
        check_device(name, check_float(name, tensor), device)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{prefix}hidden must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is not None and tensor.shape == (0,):
            raise ValueError(
                f"{name} is empty, shape (0,), as DeepSpeed ZeRO-3 leaves parameters outside their module. "
                "Gather it for the call and its backward pass: "
                "with deepspeed.zero.GatheredParameters([lm_head.weight]): ..."
            )
    if weight.dim() != 2:
        raise ValueError(f"{prefix}weight must have shape (V, D), got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden and {prefix}weight must agree in their last dimension, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{prefix}weight must have at least one row, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")


def check_no_dtensors(tensors: Mapping[str, Tensor | None]) -> None:
    """Reject DTensors: with process_group a rank passes its shard as an ordinary tensor."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} must be an ordinary tensor with process_group; to_local() gives one for a DTensor"
            )


def check_tokens(shape: torch.Size, device: torch.device, mask: Tensor | None, token_weight: object) -> None:
    """Require a bool mask, and float weights or a function of statistics, in the shape of the tokens."""
    if mask is not None:
        check_per_token("mask", mask, shape, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (mask.bool() makes it so), got {mask.dtype}")
    if token_weight is not None and not callable(token_weight):
        check_per_token("token_weight", check_float("token_weight", token_weight), shape, device)


def check_token_data(
    token_data: object, token_weight: object, shape: torch.Size, device: torch.device
) -> None:
    """Require None, or for a function token_weight tensors by name in the shape of the tokens."""
    if token_data is None:
        return
    if not callable(token_weight):
        raise ValueError("token_data goes with a function as token_weight, got it without one")
    if not isinstance(token_data, Mapping):
        raise TypeError(f"token_data must be a dict of tensors, got {type(token_data).__name__}")
    for name, tensor in token_data.items():
        check_per_token(f"token_data[{name!r}]", tensor, shape, device)


def check_reverse_weight(
    value: float | Tensor, divergence: str, shape: torch.Size, device: torch.device, mask: Tensor | None
) -> None:
    """Require a number, a 0-d tensor or one value per token between 0 and 1, only with "mixed_kl".

    The values of a tensor are checked on a CPU alone, because reading them from a GPU would wait for it.
    Masked tokens may have any value.
    """
    name, expected = "reverse_weight", "between 0 (forward KL) and 1 (reverse KL)"
    given = isinstance(value, Tensor) or value != DEFAULT_REVERSE_WEIGHT
    if divergence != "mixed_kl" and given:
        raise ValueError(f'{name} is an option of divergence "mixed_kl", got it with {divergence!r}')
    if not isinstance(value, Tensor):
        if not 0 <= require_number(name, value) <= 1:
            raise ValueError(f"{name} must be {expected}, got {value}")
        return
    check_float(name, value)
    if value.dim():
        check_per_token(name, value, shape, device)
    if value.device.type == "cpu" and not without_data():
        values = value[mask] if value.dim() and mask is not None and not mask.is_meta else value
        wrong = values[~((values >= 0) & (values <= 1))].reshape(-1)
        if len(wrong):
            raise ValueError(f"{name} must be {expected}, got {wrong[0].item()}")


def check_float(name: str, tensor: object) -> Tensor:
    """Require a tensor of a supported floating dtype, and return it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Require the device of the hidden states."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of the hidden states, {device}, got {tensor.device}")


def check_per_token(name: str, tensor: object, shape: torch.Size, device: torch.device) -> None:
    """Require a tensor with one entry per token."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_device(name, tensor, device)
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape of the tokens, {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_labels(
    labels: Tensor | None,
    hard_weight: float,
    shape: torch.Size,
    device: torch.device,
    vocab_size: int,
    mask: Tensor | None,
) -> None:
    """Require token ids below vocab_size, or -100, at valid tokens; the host waits for the device.

    Without hard_weight the labels are not used, and their range is not checked.
    """
    if labels is None:
        if hard_weight != 0:
            raise ValueError(f"labels must be given when hard_weight is not 0, got hard_weight={hard_weight}")
        return
    check_ids("labels", labels, device)
    check_per_token("labels", labels, shape, device)
    outside = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if mask is not None:
        outside &= mask
    if hard_weight != 0 and bool(outside.any()):
        worst = int(labels[outside][0])
        raise ValueError(f"labels must be in [0, {vocab_size}) or {IGNORED_LABEL}, got {worst}")


def check_support(logprobs: Tensor, ids: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Require log-probabilities and ids (..., K) of a top-k teacher."""
    check_device("teacher_logprobs", check_float("teacher_logprobs", logprobs), device)
    check_ids("teacher_ids", ids, device)
    for name, tensor in (("teacher_logprobs", logprobs), ("teacher_ids", ids)):
        if tensor.dim() != len(shape) + 1 or tensor.shape[:-1] != shape or tensor.shape[-1] < 1:
            raise ValueError(
                f"{name} must have shape (..., K) for the tokens {tuple(shape)} and K >= 1, "
                f"got {tuple(tensor.shape)}"
            )
    if logprobs.shape != ids.shape:
        raise ValueError(
            "teacher_ids must have the shape of teacher_logprobs, "
            f"got {tuple(ids.shape)} and {tuple(logprobs.shape)}"
        )


def check_ids(name: str, ids: object, device: torch.device) -> None:
    """Require an int64 or int32 tensor."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    check_device(name, ids, device)


def check_id_range(
    name: str, ids: Tensor, vocab_size: int, *, unused: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Require ids (..., K) of valid tokens to be in the vocabulary or unused.

    On a CUDA GPU the check runs as a device-side assertion, so that the host does not wait for it. ROCm
    compiles device-side assertions out, so there the result is read back.
    """
    inside = ids >= 0
    inside &= ids < vocab_size
    if unused is not None:
        inside |= unused
    if mask is not None:
        inside |= ~mask.unsqueeze(-1)
    _require_all(inside, f"{name} must be in [0, {vocab_size}) at every valid token", ids)


def check_logprobs(logprobs: Tensor, mask: Tensor | None) -> None:
    """Require that no log-probability (..., K) of a valid token is above 0 by more than rounding.

    Where the host need not wait is said in `check_id_range`.
    """
    possible = ~(logprobs > math.log1p(_ROUNDED_SUM.get(logprobs.dtype, _EXACT_SUM)))
    if mask is not None:
        possible |= ~mask.unsqueeze(-1)
    message = "teacher_logprobs must not be above 0 at a valid token (log_softmax turns logits into them)"
    _require_all(possible, message, logprobs)


def check_probabilities(logprobs: Tensor, dtype: torch.dtype) -> None:
    """Require that the probabilities of each row sum to at most 1, but for rounding.

    Args:
        logprobs: (n, K) of valid tokens, -inf at absent and repeated entries.
        dtype: what the log-probabilities have been rounded to.
    """
    total = logprobs.exp().sum(-1)
    message = (
        "teacher_logprobs must have probabilities that sum to at most 1 at every valid token "
        "(log_softmax turns logits into log-probabilities)"
    )
    _require_all(~(total > 1 + _ROUNDED_SUM.get(dtype, _EXACT_SUM)), message, total)


def _require_all(holds: Tensor, message: str, values: Tensor) -> None:
    """Require a bool tensor to be True throughout; the message ends with a value where it is not."""
    asynchronous = holds.device.type == "cuda" and torch.version.hip is None
    if asynchronous or without_data():
        torch._assert_async(holds.all(), message)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    elif not bool(holds.all()):
        raise ValueError(f"{message}, got {values[~holds][0].item():.6g}")
