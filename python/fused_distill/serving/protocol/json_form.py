"""The JSON form of log-probabilities, written in pieces so that other threads run in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .logprobs import TeacherLogprobs
from .packing import VERSION

_PIECE_NUMBERS = 1 << 16  # take about ten milliseconds
_encode = msgspec.json.Encoder().encode  # writes -inf as null


def json_pieces(response: TeacherLogprobs) -> Iterator[bytes]:
    """Yield the JSON form of a response, see `logprobs`, piece by piece."""
    head = {
        "version": VERSION,
        "lengths": response.lengths.tolist(),
        "k": response.ids.shape[1],
        "m": 0 if response.score_logprobs is None else response.score_logprobs.shape[1],
    }
    if response.score_logprobs is None:
        head["score_logprobs"] = None
    yield _encode(head)[:-1]
    ends = np.cumsum(response.lengths)[:-1]
    for name, values in response.arrays().items():
        yield b',"%s":[' % name.encode()
        parts = np.split(values, ends) if len(response.lengths) else []
        for i, part in enumerate(parts):
            yield b",[" if i else b"["
            yield from _rows(part)
            yield b"]"
        yield b"]"
    yield b"}"


def _rows(values: NDArray[Any]) -> Iterator[bytes]:
    step = max(1, _PIECE_NUMBERS // max(1, *values.shape[1:], 1))
    for start in range(0, len(values), step):
        text = _encode(values[start : start + step].tolist())[1:-1]
        yield b"," + text if start else text
