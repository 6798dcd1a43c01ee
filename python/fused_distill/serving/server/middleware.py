"""Prometheus metrics, and the checks made before a request's body is read."""

from __future__ import annotations

import secrets

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.request import SCORE_PATH
from .batching import Batcher
from .validation import RequestError, ServerLimits


class Metrics:
    """The server's Prometheus metrics, in a registry of their own."""

    def __init__(self, batcher: Batcher, limits: ServerLimits):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("teacher_requests", "Requests by status", ["status"], registry=registry)
        self.positions = Counter("teacher_positions", "Positions scored", registry=registry)
        self.seconds = Histogram(
            "teacher_request_seconds",
            "Time from request to response",
            buckets=[limits.request_seconds * 2**-i for i in reversed(range(16))],
            registry=registry,
        )
        waiting = Gauge("teacher_waiting_requests", "Requests with waiting sequences", registry=registry)
        waiting.set_function(lambda: len(batcher.queue))
        running = Gauge("teacher_running_sequences", "Sequences in the engine", registry=registry)
        running.set_function(lambda: batcher.running)


class AuthAndLimitMiddleware:
    """Check the bearer token and the size of the body before it is read, and count response statuses."""

    def __init__(self, app: ASGIApp, token: str | None, limits: ServerLimits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.authorization = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == SCORE_PATH:
                self.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        error = self._check(scope["method"], scope["path"], dict(scope["headers"]))
        await (self.app if error is None else error.response)(scope, receive, counting_send)

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        if self.authorization is not None and path != "/health":
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, self.authorization):
                return RequestError(401, "a valid bearer token is required", **{"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers or (method == "POST" and length is None):
            return RequestError(411, "the body must come with Content-Length")
        if length is not None and (not length.isdigit() or int(length) > self.limits.body_bytes):
            return RequestError(413, f"the body must have at most {self.limits.body_bytes} bytes")
        return None
