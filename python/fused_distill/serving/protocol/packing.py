"""Binary responses: named tensors and string metadata as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = 1


class WireError(ValueError):
    """A payload that is not one whole, valid response of this version."""


def pack(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Return the tensors, the metadata and the version as the bytes of a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(contiguous, {"version": str(VERSION), **metadata})


def unpack(
    payload: bytes, dtypes: Mapping[str, tuple[torch.dtype, ...]], optional: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata (without the version) that `pack` was given.

    safetensors checks that the payload has exactly the bytes that its header announces. What the numbers mean
    is for the caller to check; there is no checksum.

    Args:
        payload: one binary response.
        dtypes: every tensor's name and the dtypes that it may have.
        optional: the tensors that may be missing.

    Raises:
        WireError: the payload is truncated, too long or of another version, or its tensors do not fit.
    """
    try:
        tensors = load(payload)
        header_bytes = int.from_bytes(payload[:8], "little")
        metadata: dict[str, str] = dict(json.loads(payload[8 : 8 + header_bytes])["__metadata__"])
        version = metadata.pop("version")
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise WireError(f"payload is not a valid binary response: {type(error).__name__}: {error}") from None
    if version != str(VERSION):
        raise WireError(f"version must be {VERSION}, got {str(version)[:20]}")
    missing, unknown = dtypes.keys() - optional - tensors.keys(), tensors.keys() - dtypes.keys()
    if missing or unknown:
        raise WireError(f"payload lacks the tensors {sorted(missing)} and has unknown {sorted(unknown)[:5]}")
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes[name]:
            raise WireError(f"{name} must have a dtype in {dtypes[name]}, got {tensor.dtype}")
    return tensors, metadata
