"""The wire format of hidden states: the teacher's last hidden state before every scored token.

With the teacher's head (`head.py`) they give the whole next-token distribution: 2 Dt bytes a position in
bfloat16, whatever the vocabulary. Positions are those of `wire`. With P of them the binary form is,
little-endian and without padding:

    offset  type            field
    0       3 bytes         b"FDH"
    3       u8              version, 1
    4       u8              dtype: 0 float32, 1 bfloat16
    5       32 bytes        SHA-256 of the head's file
    37      u32             Dt
    41      u32             number of sequences n
    45      u32 x n         positions of each sequence, P in all
            dtype x P x Dt  hidden states
            u32             CRC-32 of everything before it

and the base64 form is {"version": 1, "binary": "<the binary form in base64>"}.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packing import VERSION, WireError, seal, unseal

HiddenDtype = Literal["float32", "bfloat16"]

_MAGIC = b"FDH"
_HEADER = struct.Struct("<3sBB32sII")
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """A teacher's last hidden states at the positions of some sequences, one after the other."""

    lengths: NDArray[np.int64]  # (n,) positions of each sequence
    states: Tensor  # (P, Dt)
    head_sha256: str  # of the head that they belong to; 64 hexadecimal digits

    def __post_init__(self) -> None:
        positions = int(self.lengths.sum())
        if self.states.ndim != 2 or len(self.states) != positions:
            raise WireError(f"states must have shape ({positions}, Dt), got {tuple(self.states.shape)}")

    @property
    def valid(self) -> bool:
        """Whether every number is finite."""
        return bool(self.states.isfinite().all())

    def split(self) -> list[HiddenStates]:
        """Those of each sequence."""
        parts = self.states.split(self.lengths.tolist())
        return [HiddenStates(self.lengths[i : i + 1], part, self.head_sha256) for i, part in enumerate(parts)]

    @classmethod
    def join(cls, parts: list[HiddenStates]) -> HiddenStates:
        """All of them one after the other.

        Raises:
            WireError: none at all, or of different heads.
        """
        if not parts:
            raise WireError("parts must not be empty")
        heads = {(part.head_sha256, part.states.shape[1], part.states.dtype) for part in parts}
        if len(heads) > 1:
            raise WireError(f"hidden states must belong to one head, got {len(heads)}")
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(lengths, torch.cat([part.states for part in parts]), parts[0].head_sha256)


def encode_hidden(hidden: HiddenStates, dtype: HiddenDtype = "bfloat16") -> bytes:
    """The binary form."""
    states = hidden.states.to(getattr(torch, dtype)).contiguous()
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        _DTYPES.index(states.dtype),
        bytes.fromhex(hidden.head_sha256),
        states.shape[1],
        len(hidden.lengths),
    )
    return seal(header, hidden.lengths, [states.view(torch.uint8).numpy().tobytes()])


def decode_hidden(payload: bytes) -> HiddenStates:
    """Hidden states from their binary form.

    Raises:
        WireError: anything but one whole, unchanged payload of this version.
    """
    (code, sha256, width), lengths, body = unseal(payload, _HEADER, _MAGIC, _position_bytes)
    # Little-endian bytes, as on every machine that PyTorch runs on.
    raw = torch.from_numpy(np.frombuffer(bytearray(body), np.uint8))
    states = raw.view(_DTYPES[code]).reshape(int(lengths.sum()), width)
    return HiddenStates(lengths, states, sha256.hex())


def _position_bytes(code: int, _: bytes, width: int) -> int:
    if code >= len(_DTYPES) or not width:
        raise WireError("header is corrupted")
    return width * (4 >> code)
