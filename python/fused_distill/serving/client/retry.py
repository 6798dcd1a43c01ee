"""HTTP client with retries, failover between servers and a deadline."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)
from tenacity.stop import stop_base

T = TypeVar("T")

_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}

# What decoding an unreadable response may raise.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class ServerError(ConnectionError):
    """No server gave a usable answer; the message holds the last server's response or error."""


class _Retry(Exception):
    """One server failed, but the next one or a later attempt may succeed."""

    def __init__(self, reason: str, busy: bool = False, retry_after: float = 0.0):
        super().__init__(reason)
        self.busy, self.retry_after = busy, retry_after


@dataclass(frozen=True)
class RetryPolicy:
    """How requests are retried. Every request made here is idempotent."""

    attempts: int = 6  # rounds over all servers; rounds of 429 (full queue) are limited by the deadline only
    first_wait_seconds: float = 0.25  # after a round; doubles every time, with jitter
    longest_wait_seconds: float = 8.0


class RetryingClient:
    """Send requests to one of several servers with the same content. Threads may share a client.

    Args:
        url: one server, or several; when one fails, the next is tried.
        token: bearer token.
        timeout_seconds: limit between two bytes of one attempt.
        retries: see RetryPolicy.
        transport: httpx transport.

    Raises:
        ValueError: url is empty or does not begin with http:// or https://.
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
        for server in self.urls:
            if not server.startswith(("http://", "https://")):
                raise ValueError(f"url must begin with http:// or https://, got {server!r}")
        self.retries = retries or RetryPolicy()
        self.timeout_seconds = timeout_seconds
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(headers=headers, transport=transport)
        self._preferred = 0  # index of the server that answered last
        self._closed = threading.Event()

    def stop_waiting(self) -> None:
        """Make pending requests fail instead of retrying."""
        self._closed.set()

    def close(self) -> None:
        """Close the connections; pending requests fail."""
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
        """Return the decoded first good response of any server, retrying until `deadline` (time.monotonic()).

        With `file`, the body of a good response is written there instead of being kept in memory.

        Raises:
            ServerError: a server refused the request, or none gave a good response in time.
        """
        n_servers, first = len(self.urls), self._preferred
        order = itertools.cycle([*range(first, n_servers), *range(first)])

        def try_next_server() -> T:
            if self._closed.is_set():
                raise ServerError("no usable answer: the client is closed")
            index = next(order)
            server = self.urls[index]
            try:
                response = self._attempt(method, server + path, deadline, body, file)
                if response.status_code in accepted:
                    result = decode(response)
                    self._preferred = index
                    return result
            except (httpx.RequestError, *_UNREADABLE) as error:
                raise _Retry(f"{server}: {type(error).__name__}: {error}") from None
            problem, seconds = _problem(response), response.headers.get("retry-after", "")
            if response.status_code not in _RETRIED_STATUSES:
                raise ServerError(f"{server}: {problem}")
            retry_after = float(seconds) if seconds.isdigit() and len(seconds) < 6 else 0.0
            raise _Retry(f"{server}: {problem}", response.status_code == 429, retry_after)

        first_wait, longest_wait = self.retries.first_wait_seconds, self.retries.longest_wait_seconds
        backoff = wait_random_exponential(first_wait, longest_wait, 2 ** (1 / n_servers), first_wait / 2)

        def wait(state: RetryCallState) -> float:
            end_of_round = state.attempt_number % n_servers == 0
            return max(backoff(state), _failure(state).retry_after) if end_of_round else 0.0

        retrying = Retrying(
            retry=retry_if_exception_type(_Retry),
            wait=wait,
            stop=stop_when_event_set(self._closed)
            | stop_before_delay(deadline - time.monotonic())
            | _TooManyFailures(self.retries.attempts * n_servers),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )
        try:
            return retrying(try_next_server)
        except _Retry as last:
            rounds = self.retries.attempts
            raise ServerError(f"no usable answer in time or after {rounds} rounds: {last}") from None

    def _attempt(
        self, method: str, url: str, deadline: float, body: object, file: IO[bytes] | None
    ) -> httpx.Response:
        """Send one request; stop reading its response at the deadline."""
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
                    raise httpx.ReadTimeout("the deadline passed while the response arrived")
            headers = {k: v for k, v in response.headers.items() if k != "content-encoding"}
            return httpx.Response(response.status_code, headers=headers, content=content.getvalue())


class _TooManyFailures(stop_base):
    """Stop after a number of failed attempts, without those that a full queue (429) refused."""

    def __init__(self, max_failures: int):
        self.left = max_failures

    def __call__(self, state: RetryCallState) -> bool:
        self.left -= not _failure(state).busy
        return self.left <= 0


def _failure(state: RetryCallState) -> _Retry:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, _Retry)
    return error


def _problem(response: httpx.Response) -> str:
    try:
        detail = response.json()["detail"]
    except (ValueError, LookupError, TypeError):
        detail = response.text[:500]
    return f"{response.status_code} {detail}"
