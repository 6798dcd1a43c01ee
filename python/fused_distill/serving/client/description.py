"""The server's description at /v1/teacher, and the LM head that must fit it."""

from __future__ import annotations

import math
from typing import Any

import httpx
import torch
from torch import Tensor

from ...huggingface.lm_head import LMHeadParams

_HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_HEADER_BYTES = 1 << 20


def teacher_description(response: httpx.Response) -> dict[str, Any]:
    """Return the description of a teacher, of which the fields that the client needs are valid.

    Raises:
        ValueError: a field is missing or invalid (the message names it).
    """
    description = response.json()
    if not isinstance(description, dict):
        raise ValueError(f"/v1/teacher must give an object, got {type(description).__name__}")
    limits = description.get("limits")
    capabilities = description.get("capabilities")
    if not isinstance(capabilities, list) or not all(isinstance(name, str) for name in capabilities):
        raise ValueError(f"/v1/teacher must give capabilities, a list of strings, got {capabilities!r:.100}")
    if not isinstance(limits, dict):
        raise ValueError(f"/v1/teacher must give limits, an object, got {limits!r:.100}")
    fields = {name: description.get(name) for name in ("vocab_size", "max_length")}
    fields |= {f"limits.{name}": limits.get(name) for name in ("numbers", "top_logprobs")}
    if "hidden_states" in capabilities:
        fields["hidden_size"] = description.get("hidden_size")
    for name, value in fields.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"/v1/teacher must give {name}, a number from 1 to 2^31 - 1, got {value!r:.100}")
    return description


def check_limits(description: dict[str, Any], top_logprobs: int, length: int) -> None:
    """Raise a ValueError if a teacher takes no sequence of a length, or not so many tokens per position."""
    for name, value, most in (
        ("top_logprobs", top_logprobs, description["limits"]["top_logprobs"]),
        ("length", length, description["max_length"]),
    ):
        if value > most:
            raise ValueError(f"{name} must be at most {most}, this server's limit, got {value}")


def head_bytes(description: dict[str, Any]) -> int:
    """Return the largest size of the file of the teacher's LM head."""
    return 4 * description["vocab_size"] * (description["hidden_size"] + 1) + _HEAD_HEADER_BYTES


def check_head(head: LMHeadParams, description: dict[str, Any]) -> None:
    """Check a downloaded LM head.

    Raises:
        ValueError: a tensor has a wrong dtype or shape or is not finite, or a scalar is no number.
    """
    rows, width = description["vocab_size"], description["hidden_size"]
    _check_tensor("weight", head.weight, (rows, width))
    if not _is_finite(head.weight):
        raise ValueError("the head's weight must be finite")
    if head.bias is not None:
        _check_tensor("bias", head.bias, (rows,))
        if (head.bias.isnan() | (head.bias == math.inf)).any():
            raise ValueError("the head's bias must be finite or -inf")
    scalars: dict[str, Any] = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    if scalars["softcap"] is None:
        del scalars["softcap"]
    for name, value in scalars.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value == 0:
            raise ValueError(f"the head's {name} must be a finite number other than 0, got {value!r:.100}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _HEAD_DTYPES:
        raise ValueError(f"the head's {name} must have a dtype in {_HEAD_DTYPES}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"the head's {name} must have shape {shape}, got {tuple(tensor.shape)}")


def _is_finite(tensor: Tensor) -> bool:
    # The sum needs no copy of the tensor, but it may overflow.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
