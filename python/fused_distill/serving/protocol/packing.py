"""What binary answers share: a header, the positions of each sequence, arrays, a checksum; base64 in JSON."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
# What a decoder allocates for is bounded by the payload's own size; this bounds absurd counts before that.
_MOST_SEQUENCES = 1 << 20


class WireError(ValueError):
    """A payload that is not an answer: truncated, oversized, corrupted, of another version."""


def seal(header: bytes, lengths: NDArray[np.int64], arrays: list[bytes]) -> bytes:
    """One payload of them, with its CRC-32 at the end."""
    body = b"".join([header, lengths.astype("<u4").tobytes(), *arrays])
    return body + struct.pack("<I", zlib.crc32(body))


def unseal(
    payload: bytes, header: struct.Struct, magic: bytes, position_bytes: Callable[..., int]
) -> tuple[tuple[Any, ...], NDArray[np.int64], memoryview]:
    """The header's fields, the lengths and what follows them.

    Args:
        payload: of `seal`.
        header: begins with magic and version and ends with the number of sequences.
        magic: the kind of payload.
        position_bytes: bytes of one position, from the fields between version and number of sequences.

    Raises:
        WireError: anything but one whole, unchanged payload of this kind and version.
    """
    if len(payload) < header.size + 4:
        raise WireError(f"payload must have at least {header.size + 4} bytes, got {len(payload)}")
    found, version, *fields, n = header.unpack_from(payload)
    if found != magic:
        raise WireError(f"payload must begin with {magic!r}, got {found!r}")
    if version != VERSION:
        raise WireError(f"version must be {VERSION}, got {version}")
    if n > _MOST_SEQUENCES:
        raise WireError("header is corrupted")
    each = position_bytes(*fields)
    body, at = memoryview(payload)[:-4], header.size
    if len(body) < at + 4 * n:
        raise WireError(f"payload is truncated: {len(payload)} bytes for {n} sequences")
    lengths = np.frombuffer(body, "<u4", n, at).astype(np.int64)
    at += 4 * n
    expected = at + int(lengths.sum()) * each + 4
    if len(payload) != expected:
        raise WireError(f"payload must have {expected} bytes by its header, got {len(payload)}")
    if zlib.crc32(body) != struct.unpack_from("<I", payload, len(body))[0]:
        raise WireError("payload is corrupted: its CRC-32 does not fit")
    return tuple(fields), lengths, body[at:]


def to_base64(payload: bytes) -> dict[str, Any]:
    """A payload inside JSON."""
    return {"version": VERSION, "binary": base64.b64encode(payload).decode()}


def from_base64(text: str) -> bytes:
    """The payload of "binary". Raises WireError where it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise WireError("binary is not base64") from error
