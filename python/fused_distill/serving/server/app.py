"""The teacher server's ASGI application."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi import Response as HttpResponse
from fastapi.responses import FileResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.packing import VERSION
from ..protocol.request import HEAD_PATH, SCORE_PATH
from .answers import encode_answer
from .batching import MAX_FAILURES, Batcher, BatchLimits
from .engine import TeacherEngine
from .identity import WeightsHeaderMiddleware
from .json_body import WHOLE_BYTES
from .openapi import bearer, request_body, responses
from .validation import RequestError, ServerLimits, parse_request

T = TypeVar("T")


def check_token(token: str | None) -> None:
    """Raise ValueError for a token that is empty or that no request could carry."""
    if token is not None and not token.strip():
        raise ValueError("token must not be empty")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("token must be printable ASCII without spaces, which a header can carry")


def create_app(
    engine: TeacherEngine,
    *,
    token: str | None = None,
    hosts: Collection[str] = (),
    limits: ServerLimits | None = None,
    batch_limits: BatchLimits | None = None,
) -> FastAPI:
    """Return the server's ASGI application.

    Args:
        engine: scores the sequences. Nothing else may call it; the server closes it when it stops.
        token: bearer token that every request but /health must carry. None: no token is needed.
        hosts: without a token, further names of this server that a request's Host header may have. IP
            addresses, localhost and this machine's name are known; others are refused, because a web page
            whose name an attacker resolves to this server's address could otherwise query it.
        limits: limits of a request.
        batch_limits: limits of waiting and batching.

    Raises:
        ValueError: the token is empty.
    """
    check_token(token)
    limits = limits or ServerLimits()
    batcher = Batcher(engine, batch_limits or BatchLimits(), limits.retry_after_seconds)
    registry = CollectorRegistry()
    answered = Counter("teacher_requests", "Requests by status", ["status"], registry=registry)
    positions = Counter("teacher_positions", "Positions scored", registry=registry)
    seconds = Histogram(
        "teacher_request_seconds",
        "Time from request to response",
        buckets=[limits.request_seconds * 2**-i for i in reversed(range(16))],
        registry=registry,
    )
    waiting = Gauge("teacher_waiting_requests", "Requests with waiting sequences", registry=registry)
    waiting.set_function(lambda: len(batcher.queue))
    running = Gauge("teacher_running_sequences", "Sequences in the engine", registry=registry)
    running.set_function(lambda: batcher.running)

    app = FastAPI(title="fused-distill teacher", lifespan=lambda _: batcher)
    app.add_middleware(AuthAndLimitMiddleware, token=token, hosts=hosts, limits=limits, answered=answered)
    app.add_middleware(WeightsHeaderMiddleware, fingerprint=engine.info.weights_fingerprint)

    @app.exception_handler(RequestError)
    async def error_response(_: Request, error: RequestError) -> HttpResponse:
        return error.response

    secured = bearer(token)

    @app.get("/health", responses=responses(503))
    async def health() -> dict[str, str]:
        if not batcher.alive:
            raise RequestError(503, "the engine takes no requests")
        if batcher.failures >= MAX_FAILURES:
            raise RequestError(503, "the engine fails on every batch")
        return {"status": "ok"}

    @app.get(
        "/metrics",
        dependencies=secured,
        response_class=HttpResponse,
        responses=responses(401, content="text/plain"),
    )
    async def prometheus() -> HttpResponse:
        return HttpResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/teacher", dependencies=secured, responses=responses(401))
    async def teacher() -> dict[str, Any]:
        head = engine.head_file
        return {
            **engine.info._asdict(),
            "hidden_size": None if head is None else head.head.weight.shape[1],
            "wire_version": VERSION,
            "limits": {**asdict(limits), "top_logprobs": min(limits.top_logprobs, engine.info.vocab_size)},
        }

    @app.head(HEAD_PATH, include_in_schema=False)
    @app.get(
        HEAD_PATH,
        dependencies=secured,
        response_class=HttpResponse,
        responses={
            **responses(401, 404, content="application/octet-stream"),
            304: {"description": "the client has this head: its ETag is in If-None-Match"},
        },
    )
    async def head(request: Request) -> HttpResponse:
        if engine.head_file is None:
            raise RequestError(404, "this teacher's engine has no hidden_states")
        saved = await asyncio.to_thread(engine.head_file.saved)
        headers = {"ETag": f'"{saved.sha256}"'}
        tags = ",".join(request.headers.getlist("if-none-match")).split(",")
        known = {tag.strip().removeprefix("W/") for tag in tags}
        if known & {headers["ETag"], "*"}:
            return HttpResponse(status_code=304, headers=headers)
        return FileResponse(saved.path, media_type="application/octet-stream", headers=headers)

    @app.post(
        SCORE_PATH,
        dependencies=secured,
        response_class=HttpResponse,
        responses=responses(
            *(401, 411, 413, 422, 429, 499, 500, 503, 504),
            content="application/octet-stream",
            with_json=True,
        ),
        openapi_extra=request_body(),
    )
    async def get_sequence_logprobs(request: Request) -> HttpResponse:
        with seconds.time():
            try:
                return await asyncio.wait_for(respond(request), limits.request_seconds)
            except asyncio.TimeoutError:
                raise RequestError(504, f"no answer within {limits.request_seconds:g} s") from None

    large = asyncio.Semaphore(1)

    async def in_thread(size: int, function: Callable[..., T], *arguments: Any) -> T:
        """Run work that grows with the request in a thread; large work runs one after the other."""
        async with large if size > WHOLE_BYTES else nullcontext():
            return await asyncio.to_thread(function, *arguments)

    async def respond(request: Request) -> HttpResponse:
        try:
            content = await request.body()
        except ClientDisconnect:
            raise RequestError(499, "the client has disconnected") from None
        body, sequences, options = await in_thread(len(content), parse_request, content, engine, limits)
        scoring = asyncio.create_task(batcher.submit(sequences, options))
        # After the body, the only further message is the client's disconnection.
        disconnection = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((scoring, disconnection), return_when=asyncio.FIRST_COMPLETED)
            if not scoring.done():
                raise RequestError(499, "the client has disconnected")
            result = scoring.result()
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(500, f"the engine failed: {type(error).__name__}: {error}") from error
        finally:
            scoring.cancel()
            disconnection.cancel()
        positions.inc(int(result.lengths.sum()))
        return await in_thread(result.nbytes, encode_answer, result, body)

    return app


class AuthAndLimitMiddleware:
    """Check each request before its body is read, bound the bodies, and count response statuses."""

    def __init__(
        self, app: ASGIApp, token: str | None, hosts: Collection[str], limits: ServerLimits, answered: Counter
    ):
        self.app, self.limits, self.answered = app, limits, answered
        self.authorization = None if token is None else b"Bearer " + token.encode()
        self.hosts = {name.lower() for name in ("localhost", socket.gethostname(), *hosts)}
        self.bodies_bytes = 0  # received of requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.bodies_bytes += size
            if self.bodies_bytes > self.limits.bodies_bytes:
                headers = {"Retry-After": str(self.limits.retry_after_seconds)}
                reason = f"the bodies of all requests have more than {self.limits.bodies_bytes} bytes"
                raise RequestError(503, reason, **headers)
            return message

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == SCORE_PATH:
                self.answered.labels(str(message["status"])).inc()
            await send(message)

        error = self._check(scope["method"], scope["path"], dict(scope["headers"]))
        try:
            await (self.app if error is None else error.response)(scope, counting_receive, counting_send)
        finally:
            self.bodies_bytes -= received

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        if self.authorization is not None and path != "/health":
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, self.authorization):
                return RequestError(401, "a valid bearer token is required", **{"WWW-Authenticate": "Bearer"})
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if self.authorization is None and not self._is_own(host):
            return RequestError(
                421, f"Host must be an IP address or {sorted(self.hosts)} without a token, got {host!r}"
            )
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers or (method == "POST" and length is None):
            return RequestError(411, "the body must come with Content-Length")
        if length is not None and (not length.isdigit() or int(length) > self.limits.body_bytes):
            return RequestError(413, f"the body must have at most {self.limits.body_bytes} bytes")
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
