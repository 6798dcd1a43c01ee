"""Checks of users' input: one clear error each, naming the argument, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
TAILS = ("bucket", "renormalize", "truncate")
IGNORED_LABEL = -100


class CommonOptions(TypedDict, total=False):
    """The keywords of every loss that are not tensors; see `fused_linear_jsd`."""

    beta: float
    temperature: float
    student_logit_scale: float
    student_softcap: float | None
    hard_weight: float
    soft_weight: float
    vocab_size: int | None
    reduction: str
    workspace_bytes: int | None
    backend: str
    return_stats: bool
    process_group: ProcessGroup | None


class LossOptions(CommonOptions, total=False):
    """Those of `fused_linear_jsd`."""

    teacher_logit_scale: float
    teacher_softcap: float | None


class TopKLossOptions(CommonOptions, total=False):
    """Those of `fused_linear_topk_jsd`."""

    tail: str


def check_options(options: Mapping[str, Any], allowed: type) -> None:
    """Check every keyword given, `allowed` being a TypedDict. Raises ValueError or TypeError naming it."""
    known = allowed.__annotations__
    unknown = set(options) - set(known)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; expected one of {sorted(known)}")
    beta = _number("beta", options.get("beta", 0.5))
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {beta}")
    for name in ("temperature", "student_logit_scale", "teacher_logit_scale"):
        check_positive(name, options.get(name, 1.0))
    for name in ("student_softcap", "teacher_softcap"):
        check_softcap(name, options.get(name))
    for name in ("hard_weight", "soft_weight"):
        check_not_negative(name, options.get(name, 0.0))
    for name in ("vocab_size", "workspace_bytes"):
        check_count(name, options.get(name))
    group = options.get("process_group")
    if group is not None:
        _check_group(group)
    for name, choices in (("reduction", REDUCTIONS), ("backend", BACKENDS), ("tail", TAILS)):
        if options.get(name, choices[0]) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got {options.get(name)!r}"
            )


def _check_group(group: object) -> None:
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup that this process belongs to "
            f"(of a DeviceMesh: mesh.get_group()), got {type(group).__name__}"
        )


def check_positive(name: str, value: object) -> None:
    """A number above 0."""
    if not _number(name, value) > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_not_negative(name: str, value: object) -> None:
    """A number from 0 on."""
    if not _number(name, value) >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def check_softcap(name: str, value: object) -> None:
    """A number above 0 or None."""
    if value is not None and not _number(name, value) > 0:
        raise ValueError(f"{name} must be positive or None, got {value}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """An int from `least` on, or None."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_normalizer(normalizer: float | Tensor | None, reduction: str) -> None:
    """normalizer is None, a positive number or a 0-d tensor, and goes with reduction "mean" only."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'normalizer replaces the token count of reduction="mean", got reduction={reduction!r}'
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
            )
    elif not _number("normalizer", normalizer) > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")


def check_hidden_and_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device
) -> None:
    """One model's tensors fit each other and lie on `device`."""
    for name, tensor in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None and tensor is bias:
            continue
        check_device(name, check_float(name, tensor), device)
    if hidden.dim() < 1:
        raise ValueError(f"{prefix}hidden must have shape (..., D), got a 0-d tensor")
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


def check_student(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The student's tensors, whose device is that of the call."""
    check_float("student_hidden", hidden)
    check_hidden_and_head("student_", hidden, weight, bias, hidden.device)


def check_tokens(
    shape: torch.Size, device: torch.device, mask: Tensor | None, token_weight: Tensor | None
) -> None:
    """What is given per token."""
    if mask is not None:
        check_mask(mask, shape, device)
    if token_weight is not None:
        check_float("token_weight", token_weight)
        check_per_token("token_weight", token_weight, shape, device)


def check_float(name: str, tensor: object) -> Tensor:
    """A floating-point tensor of a dtype that the library computes with."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Every tensor lies where the (student's) hidden states lie."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of the hidden states, {device}, got {tensor.device}")


def check_per_token(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """A tensor with one entry per token."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_device(name, tensor, device)
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape of the tokens, {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    """A bool tensor with one entry per token."""
    check_per_token("mask", mask, shape, device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (mask.bool() makes it so), got {mask.dtype}")


def check_labels(
    labels: Tensor | None, hard_weight: float, shape: torch.Size, device: torch.device, vocab_size: int
) -> None:
    """Token ids below vocab_size, or -100 for no label. Reads the range back from the device."""
    if labels is None:
        if hard_weight != 0:
            raise ValueError(f"labels must be given when hard_weight is not 0, got hard_weight={hard_weight}")
        return
    check_per_token("labels", labels, shape, device)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    outside = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if hard_weight != 0 and bool(outside.any()):
        worst = int(labels[outside][0])
        raise ValueError(f"labels must be in [0, {vocab_size}) or {IGNORED_LABEL}, got {worst}")


def check_vocab_size(vocab_size: int | None, **weights: Tensor) -> int:
    """The number of columns compared; every head, given by its argument's name, has that many rows."""
    least = min(map(len, weights.values()))
    if vocab_size is None:
        return least
    if vocab_size > least:
        shapes = " and ".join(f"{name} {tuple(weight.shape)}" for name, weight in weights.items())
        raise ValueError(f"vocab_size must not exceed the rows of a head, got {vocab_size} with {shapes}")
    return vocab_size


def check_support(
    logprobs: Tensor,
    ids: Tensor,
    shape: torch.Size,
    device: torch.device,
    vocab_size: int,
    mask: Tensor | None,
) -> None:
    """The teacher's log-probabilities and ids; see `fused_linear_topk_jsd` for how ids are checked."""
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
    check_id_range("teacher_ids", ids, vocab_size, unused=logprobs == -math.inf, mask=mask)


def check_ids(name: str, ids: Tensor, device: torch.device) -> None:
    """An integer tensor."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    check_device(name, ids, device)


def check_id_range(
    name: str, ids: Tensor, vocab_size: int, *, unused: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Ids (..., K) of counted tokens are in the vocabulary, or unused.

    On a CUDA GPU the check is left on the device, so that the host need not wait for it. (ROCm leaves
    device-side assertions out.)
    """
    inside = ids >= 0
    inside &= ids < vocab_size
    if unused is not None:
        inside |= unused
    if mask is not None:
        inside |= ~mask.unsqueeze(-1)
    message = f"{name} must be in [0, {vocab_size}) at every token that counts"
    if ids.device.type == "cuda" and torch.version.hip is None:
        torch._assert_async(inside.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(inside.all()):
        raise ValueError(f"{message}, got {int(ids[~inside][0])}")
