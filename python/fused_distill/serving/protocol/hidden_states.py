"""Responses with the teacher's last hidden state before every scored token.

Together with the teacher's LM head they give the whole next-token distribution, for 2 Dt bytes per position
in bfloat16 whatever the size of the vocabulary. A response of n sequences with P positions in all is a
safetensors file with the tensors

    lengths   int32 (n,)                      positions of each sequence; their sum is P
    states    float32 or bfloat16 (P, Dt)     the sequences one after the other

and the metadata `version` ("1") and `head_sha256`, the SHA-256 of the file of the LM head. Hidden states have
no plain JSON form; their base64 form is {"version": 1, "binary": "<the file in base64>"}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packing import WireError, pack, unpack

HiddenDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """A teacher's last hidden states at the positions of some sequences, one sequence after the other."""

    lengths: NDArray[np.int64]  # (n,) positions of each sequence
    states: Tensor  # (P, Dt)
    head_sha256: str  # SHA-256 of the matching LM head, 64 hexadecimal digits

    def __post_init__(self) -> None:
        positions = int(self.lengths.sum())
        if self.lengths.ndim != 1 or (self.lengths < 0).any():
            raise WireError("lengths must be a vector of numbers that are not negative")
        if self.states.ndim != 2 or len(self.states) != positions or not self.states.shape[1]:
            raise WireError(f"states must have shape ({positions}, Dt), got {tuple(self.states.shape)}")

    @property
    def nbytes(self) -> int:
        """Size of all numbers."""
        return self.states.nbytes

    @property
    def valid(self) -> bool:
        """True if every number is finite."""
        return bool(self.states.isfinite().all())

    def split(self) -> list[HiddenStates]:
        """Return one object per sequence."""
        parts = self.states.split(self.lengths.tolist())
        return [HiddenStates(self.lengths[i : i + 1], part, self.head_sha256) for i, part in enumerate(parts)]

    @classmethod
    def join(cls, parts: list[HiddenStates]) -> HiddenStates:
        """Concatenate the sequences of all parts.

        Raises:
            WireError: there is no part, or the parts belong to different heads.
        """
        if not parts:
            raise WireError("parts must not be empty")
        heads = {(part.head_sha256, part.states.shape[1], part.states.dtype) for part in parts}
        if len(heads) > 1:
            raise WireError(f"hidden states must belong to one head, got {len(heads)}")
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(lengths, torch.cat([part.states for part in parts]), parts[0].head_sha256)


def encode_hidden(hidden: HiddenStates, dtype: HiddenDtype = "bfloat16") -> bytes:
    """Return the binary form."""
    lengths = torch.from_numpy(hidden.lengths.astype(np.int32))
    states = hidden.states.to(getattr(torch, dtype))
    return pack({"lengths": lengths, "states": states}, head_sha256=hidden.head_sha256)


def decode_hidden(payload: bytes) -> HiddenStates:
    """Decode the binary form.

    Raises:
        WireError: the payload is not one whole, valid response of this version.
    """
    dtypes = {"lengths": (torch.int32,), "states": (torch.float32, torch.bfloat16)}
    tensors, metadata = unpack(payload, dtypes)
    head_sha256 = metadata.get("head_sha256", "")
    if metadata.keys() != {"head_sha256"} or not re.fullmatch("[0-9a-f]{64}", head_sha256):
        raise WireError("the metadata must be a version and a head_sha256 of 64 hexadecimal digits")
    return HiddenStates(tensors["lengths"].numpy().astype(np.int64), tensors["states"], head_sha256)
