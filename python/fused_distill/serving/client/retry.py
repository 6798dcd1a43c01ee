"""HTTP with patience: several servers, attempts repeated, a deadline over all."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar

import httpx

T = TypeVar("T")

_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class ServerError(ConnectionError):
    """A server gave no usable answer; the message says what it said."""


@dataclass(frozen=True)
class RetryPolicy:
    """How a request is repeated. Every request made here is idempotent."""

    attempts: int = 6  # rounds over all servers; a full queue (429) does not count, only the deadline does
    first_wait_seconds: float = 0.25  # after a round; doubled every time, half of it random
    longest_wait_seconds: float = 8.0


class RetryingClient:
    """Requests to one of several servers that serve the same. Threads may share it.

    Args:
        url: a server, or several; a failing one is passed over for the next.
        token: bearer token.
        timeout_seconds: between two bytes of one attempt.
        retries: see RetryPolicy.
        transport: of httpx.

    Raises:
        ValueError: no url, or one without http.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None,
        timeout_seconds: float,
        retries: RetryPolicy | None,
        transport: httpx.BaseTransport | None,
    ):
        self.urls = [u.rstrip("/") for u in ([url] if isinstance(url, str) else url)]
        if not self.urls:
            raise ValueError("url must name at least one server, got none")
        for one in self.urls:
            if not one.startswith(("http://", "https://")):
                raise ValueError(f"url must begin with http:// or https://, got {one!r}")
        self.retries = retries or RetryPolicy()
        self.timeout_seconds = timeout_seconds
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(headers=headers, transport=transport)
        self._preferred = 0  # the server that answered last
        self._closed = threading.Event()

    def stop_waiting(self) -> None:
        """Make requests under way fail instead of trying again."""
        self._closed.set()

    def close(self) -> None:
        """Give up the connections."""
        self._closed.set()
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        deadline: float,
        decode: Callable[[httpx.Response], T],
        body: object = None,
        accepted: tuple[int, ...] = (200,),
        file: IO[bytes] | None = None,
    ) -> T:
        """What `decode` makes of the first good response of any server; repeats what may succeed later.

        A good response's body goes into `file`, if there is one, and is not kept in memory.
        """
        problem, first, failures = "no attempt was made", self._preferred, 0
        for attempt in itertools.count():
            index = (first + attempt) % len(self.urls)
            wait = 0.0
            try:
                response = self._attempt(method, self.urls[index] + path, deadline, body, file)
                if response.status_code in accepted:
                    result = decode(response)
                    self._preferred = index
                    return result
                problem = f"{self.urls[index]}: {response.status_code} {_detail(response)}"
                if response.status_code not in _RETRIED:
                    raise ServerError(problem)
                asked = response.headers.get("retry-after", "")
                wait = float(asked) if asked.isdigit() and len(asked) < 6 else 0.0
                failures += response.status_code != 429
            except (httpx.RequestError, ValueError, LookupError, TypeError, AttributeError) as error:
                problem = f"{self.urls[index]}: {type(error).__name__}: {error}"
                failures += 1
            if failures >= self.retries.attempts * len(self.urls):
                break
            if (attempt + 1) % len(self.urls) == 0:
                self._wait(max(wait, self._backoff(attempt // len(self.urls))), deadline)
            if time.monotonic() >= deadline or self._closed.is_set():
                break
        raise ServerError(f"no usable answer in time or after {self.retries.attempts} rounds: {problem}")

    def _attempt(
        self, method: str, url: str, deadline: float, body: object, file: IO[bytes] | None
    ) -> httpx.Response:
        """One request whose body is read no longer than until the deadline."""
        left = max(0.001, deadline - time.monotonic())
        timeout = httpx.Timeout(min(left, self.timeout_seconds), connect=min(left, 10.0))
        with self._http.stream(method, url, json=body, timeout=timeout) as response:
            content = io.BytesIO()
            sink = file if file is not None and response.status_code == 200 else content
            sink.seek(0)
            sink.truncate()
            for chunk in response.iter_bytes():
                sink.write(chunk)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the deadline passed while the answer came in")
            headers = {k: v for k, v in response.headers.items() if k != "content-encoding"}
            return httpx.Response(response.status_code, headers=headers, content=content.getvalue())

    def _wait(self, seconds: float, deadline: float) -> None:
        self._closed.wait(max(0.0, min(seconds, deadline - time.monotonic())))

    def _backoff(self, rounds: int) -> float:
        longest = min(
            self.retries.longest_wait_seconds, self.retries.first_wait_seconds * 2.0 ** min(rounds, 30)
        )
        return longest * random.uniform(0.5, 1.0)


def _detail(response: httpx.Response) -> str:
    try:
        content = response.json()
    except ValueError:
        content = None
    return str(
        content["detail"] if isinstance(content, dict) and "detail" in content else response.text[:500]
    )
