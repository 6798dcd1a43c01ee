"""Responses with log-probabilities, in binary, base64 and JSON.

A response covers some sequences. A sequence of n tokens with prompt length p has one position per token from
index max(p, 1) on; the first token of a sequence has no context, hence no log-probability. Each position
has the K most likely tokens with their log-probabilities, the log-probability of the actual token, and those
of M tokens that the caller chose (score). A binary response of n sequences with P positions in all is a
safetensors file with the tensors

    lengths           int32 (n,)                   positions of each sequence; their sum is P
    logprobs          float32 or float16 (P, K)    descending
    ids               int32 (P, K)                 of the same tokens
    actual_logprobs   as logprobs (P,)
    score_logprobs    as logprobs (P, M)           only if the request had score_ids

and the metadata `version` ("1"). The log-probability of a token that the teacher forbids is -inf, the actual
token's too. The JSON form has the same fields, with null for -inf, which JSON does not have:

    {"version": 1, "k": K, "m": M, "lengths": [...], "logprobs": [[[...]]], "ids": [[[...]]],
     "actual_logprobs": [[...]], "score_logprobs": [[[...]]] or null}

and the base64 form is {"version": 1, "binary": "<the binary form in base64>"}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .packing import WireError, pack, unpack

Format = Literal["binary", "base64", "json"]
Dtype = Literal["float32", "float16"]

_DTYPES = {
    **dict.fromkeys(("lengths", "ids"), (torch.int32,)),
    **dict.fromkeys(("logprobs", "actual_logprobs", "score_logprobs"), (torch.float32, torch.float16)),
}


@dataclass(frozen=True)
class TeacherLogprobs:
    """A teacher's log-probabilities at the positions of some sequences, one sequence after the other."""

    lengths: NDArray[np.int64]  # (n,) positions of each sequence
    logprobs: NDArray[np.float32]  # (P, K) descending, -inf where absent
    ids: NDArray[np.int32]  # (P, K) 0 where absent
    actual_logprobs: NDArray[np.float32]  # (P,)
    score_logprobs: NDArray[np.float32] | None = None  # (P, M)

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or (self.lengths < 0).any():
            raise WireError("lengths must be a vector of numbers that are not negative")
        positions = int(self.lengths.sum())
        for name, array in self.arrays().items():
            shape = (positions,) if name == "actual_logprobs" else (positions, *array.shape[1:2])
            if array.shape != shape or array.ndim != (1 if name == "actual_logprobs" else 2):
                raise WireError(f"{name} must have shape {shape}, got {array.shape}")
        if self.ids.shape != self.logprobs.shape:
            raise WireError(f"ids must have shape {self.logprobs.shape}, got {self.ids.shape}")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays with one row per position, by name."""
        return {name: a for name, a in vars(self).items() if name != "lengths" and a is not None}

    @property
    def nbytes(self) -> int:
        """Size of all numbers."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def valid(self) -> bool:
        """True if no number is NaN or +inf. A token that the teacher forbids has -inf."""
        return not any((np.isnan(values) | (values == np.inf)).any() for values in self.arrays().values())

    def split(self) -> list[TeacherLogprobs]:
        """Return one object per sequence."""
        ends = np.cumsum(self.lengths)[:-1]
        parts = zip(*(np.split(array, ends) for array in self.arrays().values()), strict=True)
        return [TeacherLogprobs(np.array([n]), *part) for n, part in zip(self.lengths, parts, strict=False)]

    @classmethod
    def join(cls, parts: list[TeacherLogprobs]) -> TeacherLogprobs:
        """Concatenate the sequences of all parts.

        Raises:
            WireError: there is no part, K or M differs, or only some parts have score_logprobs.
        """
        if not parts:
            raise WireError("parts must not be empty")
        # K and M of a part without positions have no meaning.
        arrays = [part.arrays() for part in parts if len(part.ids)] or [parts[0].arrays()]
        if len({len(a) for a in arrays}) > 1:
            raise WireError("all responses must carry score_logprobs or none, got a mixture")
        widths = [{a[name].shape[1] for a in arrays if name in a} for name in ("ids", "score_logprobs")]
        if max(map(len, widths)) > 1:
            raise WireError(f"responses must agree in K and M, got K in {widths[0]} and M in {widths[1]}")
        joined = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        return cls(np.concatenate([part.lengths for part in parts]), **joined)


def encode_binary(response: TeacherLogprobs, dtype: Dtype = "float32") -> bytes:
    """Return the binary form. float16 keeps about 3 digits of the log-probabilities in half the bytes."""
    arrays = response.arrays()
    tensors = {"lengths": response.lengths.astype(np.int32), "ids": arrays.pop("ids").astype(np.int32)}
    # A finite number must stay finite in float16, because -inf marks an absent entry.
    lowest = np.finfo(dtype).min
    for name, values in arrays.items():
        tensors[name] = np.where(np.isneginf(values), values, np.maximum(values, lowest)).astype(dtype)
    return pack({name: torch.from_numpy(array) for name, array in tensors.items()})


def decode_binary(payload: bytes) -> TeacherLogprobs:
    """Decode the binary form. NaN passes, so that the client can name its position.

    Raises:
        WireError: the payload is not one whole, valid response of this version.
    """
    tensors, metadata = unpack(payload, _DTYPES, optional=frozenset({"score_logprobs"}))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    lengths, ids = arrays.pop("lengths").astype(np.int64), arrays.pop("ids")
    if metadata or len({array.dtype for array in arrays.values()}) > 1:
        raise WireError("a response must have one dtype of log-probabilities and no metadata but a version")
    if (ids < 0).any() or any((values == np.inf).any() for values in arrays.values()):
        raise WireError("ids must not be negative, and log-probabilities must not be +inf")
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    return TeacherLogprobs(lengths=lengths, ids=ids, **floats)
