"""The wire format: what a teacher server answers, in binary and in JSON.

An answer covers some sequences. Of a sequence of n tokens with prompt length p it has one position for every
token from index max(p, 1) on: the first token of a sequence has nothing before it, hence no log-probability.
A position has the K most likely tokens with their log-probabilities, the log-probability of the token
that is there (actual), and those of M tokens that the caller chose (score). With P positions in all, one
sequence after the other, the binary form is, little-endian and without padding:

    offset  type            field
    0       3 bytes         b"FDT"
    3       u8              version, 1
    4       u8              dtype of log-probabilities: 0 float32, 1 float16
    5       u8              1 if score_logprobs follow, else 0
    6       u16             K
    8       u16             M, 0 without score_logprobs
    10      u32             number of sequences n
    14      u32 x n         positions of each sequence, P in all
            dtype x P x K   logprobs, descending; -inf where absent
            i32 x P x K     ids; 0 where absent
            dtype x P       actual_logprobs
            dtype x P x M   score_logprobs
            u32             CRC-32 of everything before it

The JSON form has the same fields, log-probabilities as numbers or null for -inf:

    {"version": 1, "k": K, "m": M, "lengths": [...], "logprobs": [[[...]]], "ids": [[[...]]],
     "actual_logprobs": [[...]], "score_logprobs": [[[...]]] or null}

and the base64 form is {"version": 1, "binary": "<the binary form in base64>"}.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from .packing import VERSION, WireError, from_base64, seal, to_base64, unseal

Format = Literal["binary", "base64", "json"]
Dtype = Literal["float32", "float16"]

_MAGIC = b"FDT"
_HEADER = struct.Struct("<3sBBBHHI")
_DTYPES: tuple[Dtype, ...] = ("float32", "float16")
MOST_K = (1 << 16) - 1  # of K and of M

SCORE_PATH = "/get_sequence_logprobs/"
HEAD_PATH = "/v1/teacher/head"


def first_scored(prompt_length: int) -> int:
    """The first token of a sequence with a log-probability."""
    return max(prompt_length, 1)


def scored_positions(n_tokens: int, prompt_length: int) -> int:
    """How many tokens of a sequence have one."""
    return max(n_tokens - first_scored(prompt_length), 0)


def check_request(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    score_ids: Sequence[Sequence[Sequence[int]]] | None,
) -> None:
    """What client and server ask of a request alike. Raises ValueError naming the field and the index."""
    for name, values in (("prompt_lengths", prompt_lengths), ("score_ids", score_ids)):
        if values is not None and len(values) != len(sequences):
            raise ValueError(f"{name} must be {len(sequences)}, one a sequence, got {len(values)}")
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 0 <= prompt_length <= len(tokens):
            raise ValueError(
                f"prompt_lengths[{i}] must be between 0 and the sequence's {len(tokens)} tokens, "
                f"got {prompt_length}"
            )


@dataclass(frozen=True)
class TeacherLogprobs:
    """A teacher's log-probabilities at the positions of some sequences, one after the other."""

    lengths: NDArray[np.int64]  # (n,) positions of each sequence
    logprobs: NDArray[np.float32]  # (P, K) descending, -inf where absent
    ids: NDArray[np.int32]  # (P, K) 0 where absent
    actual_logprobs: NDArray[np.float32]  # (P,)
    score_logprobs: NDArray[np.float32] | None = None  # (P, M)

    def __post_init__(self) -> None:
        positions = int(self.lengths.sum())
        k = self.logprobs.shape[-1]
        shapes = {"logprobs": (positions, k), "ids": (positions, k), "actual_logprobs": (positions,)}
        if self.score_logprobs is not None:
            shapes["score_logprobs"] = (positions, self.score_logprobs.shape[-1])
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise WireError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")

    @property
    def valid(self) -> bool:
        """Whether no number is NaN."""
        numbers = (self.logprobs, self.actual_logprobs, self.score_logprobs)
        return not any(np.isnan(values).any() for values in numbers if values is not None)

    def split(self) -> list[TeacherLogprobs]:
        """One answer per sequence."""
        ends = np.cumsum(self.lengths)
        parts = [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        return [
            TeacherLogprobs(
                self.lengths[i : i + 1],
                self.logprobs[part],
                self.ids[part],
                self.actual_logprobs[part],
                None if self.score_logprobs is None else self.score_logprobs[part],
            )
            for i, part in enumerate(parts)
        ]

    @classmethod
    def join(cls, answers: list[TeacherLogprobs]) -> TeacherLogprobs:
        """All of them one after the other.

        Raises:
            WireError: none at all, different K or M, or score_logprobs in some only.
        """
        if not answers:
            raise WireError("answers must not be empty")
        # Without positions K and M mean nothing.
        filled = [a for a in answers if len(a.actual_logprobs)] or answers[:1]
        scores = [a.score_logprobs for a in filled if a.score_logprobs is not None]
        if scores and len(scores) < len(filled):
            raise WireError("all answers must carry score_logprobs or none, got a mixture")
        widths = {a.logprobs.shape[-1] for a in filled}, {s.shape[-1] for s in scores}
        if max(map(len, widths)) > 1:
            raise WireError(f"answers must agree in K and M, got K in {widths[0]} and M in {widths[1]}")
        return cls(
            np.concatenate([a.lengths for a in answers]),
            np.concatenate([a.logprobs for a in filled]),
            np.concatenate([a.ids for a in filled]),
            np.concatenate([a.actual_logprobs for a in filled]),
            np.concatenate(scores) if scores else None,
        )

    def checked(self) -> TeacherLogprobs:
        """Itself, if its numbers can be log-probabilities and ids. NaN may be: the client says where."""
        for name in ("logprobs", "actual_logprobs", "score_logprobs"):
            values = getattr(self, name)
            if values is not None and (values == np.inf).any():
                raise WireError(f"{name} must not be infinite")
        if (self.ids < 0).any():
            raise WireError("ids must not be negative")
        return self


def encode_binary(answer: TeacherLogprobs, dtype: Dtype = "float32") -> bytes:
    """The binary form. float16 halves the log-probabilities' bytes and keeps about 3 digits of them."""
    code = _DTYPES.index(dtype)
    kind = np.dtype(f"<f{4 >> code}")
    scores = answer.score_logprobs
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        code,
        scores is not None,
        answer.logprobs.shape[1],
        0 if scores is None else scores.shape[1],
        len(answer.lengths),
    )

    def packed(values: NDArray[np.float32]) -> bytes:
        least = np.finfo(kind).min  # a finite number stays finite: -inf would say that the entry is absent
        return np.where(np.isneginf(values), values, np.maximum(values, least)).astype(kind).tobytes()

    arrays = [packed(answer.logprobs), answer.ids.astype("<i4").tobytes(), packed(answer.actual_logprobs)]
    if scores is not None:
        arrays.append(packed(scores))
    return seal(header, answer.lengths, arrays)


def decode_binary(payload: bytes) -> TeacherLogprobs:
    """An answer from its binary form.

    Raises:
        WireError: anything but one whole, unchanged answer of this version.
    """
    fields, lengths, body = unseal(payload, _HEADER, _MAGIC, _position_bytes)
    code, has_scores, k, m = fields
    kind, positions, at = np.dtype(f"<f{4 >> code}"), int(lengths.sum()), 0

    def take(dtype: Any, *shape: int) -> NDArray[Any]:
        nonlocal at
        count = int(np.prod(shape))
        array = np.frombuffer(body, dtype, count, at).reshape(shape)
        at += array.nbytes
        return array

    logprobs = take(kind, positions, k).astype(np.float32)
    ids = take("<i4", positions, k).astype(np.int32)
    actual = take(kind, positions).astype(np.float32)
    scores = take(kind, positions, m).astype(np.float32) if has_scores else None
    return TeacherLogprobs(lengths, logprobs, ids, actual, scores).checked()


def _position_bytes(code: int, has_scores: int, k: int, m: int) -> int:
    if code >= len(_DTYPES) or has_scores > 1 or (m and not has_scores):
        raise WireError("header is corrupted")
    itemsize = 4 >> code
    return k * (itemsize + 4) + itemsize * (1 + m)


_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Numbers = Annotated[list[float | None], FailFast()]


class _JsonAnswer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: _Count
    k: Annotated[int, Field(ge=0, le=MOST_K)]
    m: Annotated[int, Field(ge=0, le=MOST_K)]
    lengths: Annotated[list[_Count], FailFast()]
    logprobs: list[list[_Numbers]]
    ids: list[list[Annotated[list[_Count], FailFast()]]]
    actual_logprobs: list[_Numbers]
    score_logprobs: list[list[_Numbers]] | None


class _Base64Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: _Count
    binary: str


def encode_json(answer: TeacherLogprobs) -> dict[str, Any]:
    """The JSON form, ready for any JSON library."""
    parts = answer.split()
    scores = answer.score_logprobs
    return {
        "version": VERSION,
        "lengths": answer.lengths.tolist(),
        "k": answer.logprobs.shape[1],
        "m": 0 if scores is None else scores.shape[1],
        "logprobs": [_with_null(part.logprobs) for part in parts],
        "ids": [part.ids.tolist() for part in parts],
        "actual_logprobs": [_with_null(part.actual_logprobs) for part in parts],
        "score_logprobs": None if scores is None else [_with_null(part.score_logprobs) for part in parts],
    }


def _with_null(values: NDArray[Any] | None) -> list[Any]:
    assert values is not None
    objects = values.astype(object)
    objects[np.isneginf(values)] = None
    return objects.tolist()


def decode_json(content: object) -> TeacherLogprobs:
    """An answer from its JSON or base64 form, parsed.

    Raises:
        WireError: as `decode_binary`.
    """
    base64_form = isinstance(content, dict) and "binary" in content
    try:
        found = (_Base64Answer if base64_form else _JsonAnswer).model_validate(content)
    except (ValidationError, RecursionError) as error:
        raise WireError(f"JSON is no answer: {str(error).splitlines()[0]}") from None
    if found.version != VERSION:
        raise WireError(f"version must be {VERSION}, got {found.version}")
    if isinstance(found, _Base64Answer):
        return decode_binary(from_base64(found.binary))
    if found.m and found.score_logprobs is None:
        raise WireError("m must be 0 without score_logprobs")
    positions = sum(found.lengths)

    def array(name: str, rows: list[Any], dtype: Any, *width: int) -> NDArray[Any]:
        if [len(part) for part in rows] != found.lengths:
            raise WireError(f"{name} must have lengths {found.lengths}, got {[len(part) for part in rows]}")
        flat = [row for part in rows for row in part]
        if width and any(len(row) != width[0] for row in flat):
            raise WireError(f"{name} must have {width[0]} entries a position")
        values = [v for row in flat for v in row] if width else flat
        whole = np.array([-np.inf if v is None else v for v in values], dtype=np.float64)
        if (
            whole.size
            and np.abs(whole, where=np.isfinite(whole), out=np.zeros_like(whole)).max()
            > np.finfo(np.float32).max
        ):
            raise WireError(f"{name} holds a number out of range")
        return whole.astype(dtype).reshape(positions, *width)

    logprobs = array("logprobs", found.logprobs, np.float32, found.k)
    ids = array("ids", found.ids, np.int32, found.k)
    actual = array("actual_logprobs", found.actual_logprobs, np.float32)
    scores = None
    if found.score_logprobs is not None:
        scores = array("score_logprobs", found.score_logprobs, np.float32, found.m)
    lengths = np.array(found.lengths, dtype=np.int64)
    return TeacherLogprobs(lengths, logprobs, ids, actual, scores).checked()


def encode_base64(answer: TeacherLogprobs, dtype: Dtype = "float32") -> dict[str, Any]:
    """The binary form inside JSON."""
    return to_base64(encode_binary(answer, dtype))
