"""All answers of a teacher must come from the same weights, whichever server gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..protocol.request import WEIGHTS_HEADER
from .request import TeacherError

T = TypeVar("T")

_TOLERANCE = 0.1  # nats, mean over the tokens; half-precision servers with equal weights differ by less


def server_of(response: httpx.Response) -> str:
    """Return the address of the server that gave a response, without credentials and path."""
    url = response.url
    return f"{url.scheme}://{url.netloc.decode()}"


class SameFingerprint:
    """Compare the fingerprint of every answer with that of the first one. Threads may share it."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}  # server and fingerprint, under one key

    def then(self, decode: Callable[[httpx.Response], T]) -> Callable[[httpx.Response], T]:
        """Return a decoder that first raises a TeacherError if a response comes from other weights."""

        def check_and_decode(response: httpx.Response) -> T:
            self._check(server_of(response), response.headers.get(WEIGHTS_HEADER))
            return decode(response)

        return check_and_decode

    def _check(self, server: str, fingerprint: str | None) -> None:
        if fingerprint is None and not self._first:
            return  # a server that cannot tell
        first_server, first = self._first.setdefault("first", (server, str(fingerprint)))
        if fingerprint != first:
            raise TeacherError(
                f"{server} answers with other weights than this client's first answer had: their fingerprint "
                f"is {fingerprint}, that of {first_server} was {first}. {_ADVICE}"
            )


class SameLogprobs:
    """Compare the log-probabilities of some tokens with the first ones, for servers without a fingerprint.

    Threads may share it. The tokens are the beginning of the first sequence that is scored.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}
        self._first: dict[str, tuple[str, NDArray[np.float32]]] = {}

    def tokens(self, sequence: list[int], count: int = 16) -> list[int]:
        """Return the tokens to score, at least two of them."""
        return self._tokens.setdefault("tokens", (sequence if len(sequence) > 1 else sequence * 2)[:count])

    def check(self, server: str, logprobs: NDArray[np.float32]) -> None:
        """Raise a TeacherError if a server's log-probabilities of the tokens are not the first ones."""
        if np.isnan(logprobs).any():
            return  # numbers are missing, which the check of the answer itself reports
        first_server, first = self._first.setdefault("first", (server, logprobs))
        difference = mean_difference(logprobs, first)
        if difference > _TOLERANCE:
            raise TeacherError(
                f"{server} answers with other weights than this client's first answer had: the "
                f"log-probabilities of {len(first)} tokens are {_shown(logprobs)}, those of {first_server} "
                f"were {_shown(first)}, a mean difference of {difference:.3g}. {_ADVICE}"
            )


_ADVICE = "All servers of a teacher must have the same weights and keep them while a client uses them"


def mean_difference(a: ArrayLike, b: ArrayLike) -> float:
    """Return the mean absolute difference, in which equal infinities differ by 0."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        return float(np.where(x == y, 0.0, np.abs(x - y)).mean())


def _shown(logprobs: NDArray[np.float32]) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in logprobs[:4]) + ", ...]"
