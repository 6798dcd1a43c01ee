"""Checks of users' input: one clear error each, naming the argument, before any work."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
IGNORED_LABEL = -100


class LossOptions(TypedDict, total=False):
    """The keywords of `fused_linear_jsd` that are not tensors; see there."""

    beta: float
    temperature: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    hard_weight: float
    soft_weight: float
    vocab_size: int | None
    reduction: str
    workspace_bytes: int | None
    backend: str
    return_stats: bool


def check_options(**options: Unpack[LossOptions]) -> None:
    """Check every keyword that is given. Raises ValueError or TypeError naming it."""
    unknown = set(options) - set(LossOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"unknown option {sorted(unknown)[0]!r}; expected one of {sorted(LossOptions.__annotations__)}"
        )
    beta = _number("beta", options.get("beta", 0.5))
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {beta}")
    if not _number("temperature", options.get("temperature", 1.0)) > 0:
        raise ValueError(f"temperature must be positive, got {options.get('temperature')}")
    for name in ("student_logit_scale", "teacher_logit_scale"):
        if not _number(name, options.get(name, 1.0)) > 0:
            raise ValueError(f"{name} must be positive, got {options.get(name)}")
    for name in ("student_softcap", "teacher_softcap"):
        value = options.get(name)
        if value is not None and not _number(name, value) > 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    for name in ("hard_weight", "soft_weight"):
        if not _number(name, options.get(name, 0.0)) >= 0:
            raise ValueError(f"{name} must not be negative, got {options.get(name)}")
    for name in ("vocab_size", "workspace_bytes"):
        value = options.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, allowed in (("reduction", REDUCTIONS), ("backend", BACKENDS)):
        if options.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {options.get(name)!r}"
            )


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
    model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device
) -> None:
    """One model's tensors fit each other and lie on `device`."""
    for name, tensor in ((f"{model}_hidden", hidden), (f"{model}_weight", weight), (f"{model}_bias", bias)):
        if tensor is None and tensor is bias:
            continue
        check_device(name, check_float(name, tensor), device)
    if hidden.dim() < 1:
        raise ValueError(f"{model}_hidden must have shape (..., D), got a 0-d tensor")
    if weight.dim() != 2:
        raise ValueError(f"{model}_weight must have shape (V, D), got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden and {model}_weight must agree in their last dimension, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{model}_weight must have at least one row, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{model}_bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")


def check_float(name: str, tensor: object) -> Tensor:
    """A floating-point tensor of a dtype that the library computes with."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Every tensor lies where student_hidden lies."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of student_hidden, {device}, got {tensor.device}")


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


def check_vocab_size(vocab_size: int | None, student_weight: Tensor, teacher_weight: Tensor) -> int:
    """The number of columns compared; both heads have that many rows."""
    least = min(len(student_weight), len(teacher_weight))
    if vocab_size is None:
        return least
    if vocab_size > least:
        raise ValueError(
            f"vocab_size must not exceed either head, got {vocab_size} with "
            f"student_weight {tuple(student_weight.shape)} and teacher_weight {tuple(teacher_weight.shape)}"
        )
    return vocab_size
