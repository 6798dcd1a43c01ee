"""HTTP client with retries, failover between servers and a deadline."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar

import httpx
import tenacity

T = TypeVar("T")

_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}

# What decoding an unreadable response may raise.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class ServerError(ConnectionError):
    """No server gave a usable answer; the message holds the last server's response or error."""

    retry_after: float | None = None  # seconds before another round over all servers; None: it is no use


@dataclass(frozen=True)
class RetryPolicy:
    """How requests are retried. Every request made here is idempotent."""

    attempts: int = 6  # rounds over all servers; rounds of 429 (full queue) are limited by the deadline only
    first_wait_seconds: float = 0.25  # after a round; doubles every time, with jitter, plus Retry-After
    longest_wait_seconds: float = 8.0


class RetryingClient:
    """Send requests to one of several servers with the same content. Threads may share a client.

    The arguments are those of `TeacherClient`.

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
        self.closed = threading.Event()  # set: pending requests fail instead of retrying

    def close(self) -> None:
        """Close the connections; pending requests fail."""
        self.closed.set()
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
        failed_rounds = 0
        wait, longest_wait = self.retries.first_wait_seconds, self.retries.longest_wait_seconds

        @tenacity.retry(
            retry=tenacity.retry_if_exception(lambda e: getattr(e, "retry_after", None) is not None),
            wait=tenacity.wait_random_exponential(wait, longest_wait, min=wait / 2)
            + tenacity.wait_exception(lambda e: getattr(e, "retry_after", 0.0)),
            stop=tenacity.stop_when_event_set(self.closed)
            | tenacity.stop_before_delay(deadline - time.monotonic()),
            sleep=tenacity.sleep_using_event(self.closed),
            reraise=True,
        )
        def one_round() -> T:
            nonlocal failed_rounds
            problem, busy, retry_after, first = "the client is closed", True, 0.0, self._preferred
            for index in (*range(first, len(self.urls)), *range(first)):
                if self.closed.is_set() or (index != first and time.monotonic() >= deadline):
                    break
                server = self.urls[index]
                try:
                    response = self._attempt(method, server + path, deadline, body, file)
                    if response.status_code in accepted:
                        result = decode(response)
                        self._preferred = index
                        return result
                except (httpx.RequestError, *_UNREADABLE) as error:
                    problem, busy = f"{server}: {type(error).__name__}: {error}", False
                    continue
                problem = f"{server}: {response.status_code} {_detail(response)}"
                if response.status_code not in _RETRIED_STATUSES:
                    raise ServerError(problem)
                busy &= response.status_code == 429
                seconds = response.headers.get("retry-after", "")
                retry_after = float(seconds) if seconds.isdigit() and len(seconds) < 6 else 0.0
            failed_rounds += not busy
            if failed_rounds >= self.retries.attempts:
                raise ServerError(f"no usable answer in {failed_rounds} rounds: {problem}")
            error = ServerError(f"no usable answer: {problem} (closed or past the deadline)")
            error.retry_after = retry_after
            raise error

        return one_round()

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
            return httpx.Response(
                response.status_code, headers=headers, content=content.getvalue(), request=response.request
            )


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return response.text[:500]
