"""HTTP client with retries, failover between servers and a deadline."""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar
from weakref import WeakSet

import httpx
import tenacity

from ..protocol.urls import split_credentials
from .arguments import check_token, positive_number, server_urls, whole_number
from .exchange import Request
from .session import ServerError, Session

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_LOG_SECONDS = 10.0  # a warning follows when a request is retried for so long, and another after as long

_LAST_ROUND_SECONDS = 1.0  # before the deadline, the last round over all servers begins

_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_DESCRIPTION_BYTES = 16 << 20  # largest response of endpoints that describe or control a server

# What decoding an unreadable response may raise.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
# What httpx raises before it connects, for reasons that do not pass.
_NOT_SENT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


@dataclass(frozen=True)
class RetryPolicy:
    """How requests are retried until the call's deadline. Every request made here is idempotent.

    An unreachable or busy server is retried until the deadline, so that a call outlives a server's restart.

    Raises:
        ValueError: an argument is invalid (the message names it).
    """

    attempts: int | None = None  # rounds over all servers, not counting 429 (full queue); None: no limit
    first_wait_seconds: float = 0.25  # after a round; doubles every time, with jitter, plus Retry-After
    longest_wait_seconds: float = 8.0
    # Rounds with status 500, an unreadable response or a certificate that was refused.
    wrong_answers: int = 20

    def __post_init__(self) -> None:
        if self.attempts is not None:
            whole_number("attempts", self.attempts, at_least=1)
        whole_number("wrong_answers", self.wrong_answers, at_least=1)
        for name in ("first_wait_seconds", "longest_wait_seconds"):
            positive_number(name, getattr(self, name))


class RetryingClient:
    """Send requests to one of several servers with the same content.

    Threads may share a client. A process that is forked or gets a pickled client makes its own connections.
    The arguments are those of `TeacherClient`.

    Raises:
        ValueError: an argument is invalid (the message names it).
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None,
        timeout_seconds: float,
        retries: RetryPolicy | None,
        transport: httpx.BaseTransport | None,
        concurrency: int = 1,
    ):
        servers = [split_credentials(address) for address in server_urls(url)]
        self.urls = [server for server, _ in servers]
        check_token(token)
        if retries is not None and not isinstance(retries, RetryPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"retries must be a RetryPolicy, got {retries!r}")
        self.retries = retries or RetryPolicy()
        self.timeout_seconds = positive_number("timeout_seconds", timeout_seconds)
        self.concurrency = whole_number("concurrency", concurrency, at_least=1)
        self._auth, self._token, self._transport = _UrlCredentials(servers), token, transport
        self._preferred = 0  # index of the server that answered last
        self.closed = False
        self._start()

    def _start(self) -> None:
        """Begin without connections, as a new process does."""
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._logged = 0.0  # time of the last warning
        _CLIENTS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_session", "_logged")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def after_fork(self) -> None:
        """Leave the parent's connections to the parent."""
        if self._session is not None:
            self._session.abandon()
        self._start()

    def _connections(self) -> Session:
        with self._lock:
            if self.closed:
                raise ServerError("the client is closed")
            if self._session is None:
                self._session = Session(self._new_http(), self.concurrency)
            return self._session

    def _new_http(self) -> httpx.Client:
        headers = {"Accept-Encoding": "identity"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        hosts = {httpx.URL(url).host for url in self.urls}
        # A pattern without a transport takes the default one, which knows no proxy of the environment.
        direct = {f"all://[{h}]" if ":" in h else f"all://{h}": None for h in hosts if _is_loopback(h)}
        try:
            return httpx.Client(
                headers=headers,
                transport=self._transport,
                mounts=direct,
                auth=self._auth,
                verify=httpx.create_ssl_context(),  # with the certificates that the environment names
                trust_env=len(direct) < len(hosts),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            names = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY"
            raise ServerError(f"the environment's proxies ({names}) cannot be used: {error}") from error

    def close(self) -> None:
        """Close the connections; pending requests fail at once."""
        with self._lock:
            self.closed = True
        if self._session is not None:
            self._session.end()

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run calls of `send` in threads, `concurrency` at once, and return their results in order.

        `close` and Ctrl-C end it at once, whatever the threads wait for.

        Raises:
            ServerError: the client is closed.
        """
        return self._connections().run(calls)

    def send_one(self, *arguments: Any, **options: Any) -> Any:
        """Call `send` in a thread, so that `close` ends it at once."""
        return self.run([partial(self.send, *arguments, **options)])[0]

    def send(
        self,
        method: str,
        path: str,
        deadline: float,
        decode: Callable[[httpx.Response], T],
        body: object = None,
        accepted: tuple[int, ...] = (200,),
        file: IO[bytes] | None = None,
        max_bytes: int = _DESCRIPTION_BYTES,
    ) -> T:
        """Return the decoded first good response of any server, retrying until `deadline` (time.monotonic()).

        With `file`, the body of a good response is written there instead of being kept in memory. A response
        of more than `max_bytes` is not read on.

        Raises:
            ServerError: a server refused the request, or none gave a good response in time.
        """
        session, started = self._connections(), time.monotonic()
        stop, policy = session.stop, self.retries
        request = Request(method, path, body, deadline, self.timeout_seconds, accepted, max_bytes, file)
        rounds = wrong_rounds = 0
        last_start = deadline - min(_LAST_ROUND_SECONDS, (deadline - started) / 10)
        backoff = tenacity.wait_random_exponential(
            policy.first_wait_seconds, policy.longest_wait_seconds, min=policy.first_wait_seconds / 2
        ) + tenacity.wait_exception(lambda e: getattr(e, "retry_after", 0.0))

        @tenacity.retry(
            retry=tenacity.retry_if_exception(lambda e: getattr(e, "retry_after", None) is not None),
            wait=lambda state: max(0.0, min(backoff(state), last_start - time.monotonic())),
            stop=tenacity.stop_when_event_set(stop),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        def one_round() -> T:
            nonlocal rounds, wrong_rounds
            problem, busy, wrong, retry_after, first = (
                "the client is closed",
                True,
                False,
                0.0,
                self._preferred,
            )
            for index in (*range(first, len(self.urls)), *range(first)):
                if stop.is_set() or (index != first and time.monotonic() >= deadline):
                    break
                name = self.urls[index]
                try:
                    response = request.send(session, self.urls[index])
                    if response.status_code in accepted:
                        result = decode(response)
                        self._preferred = index
                        return result
                except Exception as error:
                    unreadable = isinstance(error, _UNREADABLE)
                    if not (unreadable or isinstance(error, httpx.RequestError) or stop.is_set()):
                        raise
                    problem, busy = f"{name}: {type(error).__name__}: {error}", False
                    wrong |= unreadable or isinstance(error, _NOT_SENT) or _untrusted(error)
                    continue
                problem = f"{name}: {response.status_code} {_detail(response)}"
                if response.status_code not in _RETRIED_STATUSES:
                    raise ServerError(problem)
                busy &= response.status_code == 429
                wrong |= response.status_code == 500
                seconds = response.headers.get("retry-after", "")
                retry_after = float(seconds) if seconds.isdigit() and len(seconds) < 6 else 0.0
            rounds += not busy
            wrong_rounds += wrong
            if rounds == policy.attempts or wrong_rounds == policy.wrong_answers:
                raise ServerError(f"no usable answer in {rounds} rounds: {problem}")
            if time.monotonic() + retry_after >= last_start:
                raise ServerError(f"no usable answer: {problem} (too late for another try)")
            self._warn(f"{method} {path}", started, deadline, problem)
            error = ServerError(f"no usable answer: {problem} (the client is closed)")
            error.retry_after = retry_after
            raise error

        return one_round()

    def _warn(self, request: str, started: float, deadline: float, problem: str) -> None:
        """Log what is retried and why, if that has taken long, once per _LOG_SECONDS of this client."""
        now = time.monotonic()
        if now - max(started, self._logged) >= _LOG_SECONDS:
            self._logged = now
            _LOG.warning(
                "%s is being retried for %.0f s, at most for another %.0f s: %s",
                request,
                now - started,
                deadline - now,
                problem,
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _untrusted(error: BaseException | None) -> bool:
    """Return whether a server's TLS certificate was refused; httpx's error has ssl's among its causes."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__
    return error is not None


class _UrlCredentials(httpx.Auth):
    """Basic authentication by user names and passwords that came in the servers' addresses."""

    def __init__(self, servers: list[tuple[str, tuple[str, str] | None]]):
        pairs = [(httpx.URL(url), credentials) for url, credentials in servers if credentials is not None]
        # Longer paths first: a gateway may have several servers.
        pairs.sort(key=lambda pair: len(pair[0].path), reverse=True)
        self._servers = [
            (url.netloc, url.path.rstrip("/") + "/", httpx.BasicAuth(*pair)) for url, pair in pairs
        ]

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        netloc, path = request.url.netloc, request.url.path
        for host, prefix, basic in self._servers:
            if host == netloc and path.startswith(prefix):
                yield from basic.auth_flow(request)
                return
        yield request


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])[:500]
    except _UNREADABLE:
        return response.text[:500]


_CLIENTS: WeakSet[RetryingClient] = WeakSet()


def _after_fork() -> None:
    for client in list(_CLIENTS):
        client.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
