"""The teacher server's ASGI application."""

from __future__ import annotations

import asyncio
import base64
import secrets
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi import Response as HttpResponse
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.hidden_states import HiddenStates, encode_hidden
from ..protocol.logprobs import encode_binary, encode_json
from ..protocol.packing import VERSION
from ..protocol.request import HEAD_PATH, SCORE_PATH
from .batching import MAX_FAILURES, Batcher, BatchLimits
from .engine import Result, TeacherEngine
from .identity import WeightsHeaderMiddleware
from .validation import RequestBody, RequestError, ServerLimits, parse_request


def check_token(token: str | None) -> None:
    """Raise ValueError for an empty token."""
    if token is not None and not token.strip():
        raise ValueError("token must not be empty")


def create_app(
    engine: TeacherEngine,
    *,
    token: str | None = None,
    limits: ServerLimits | None = None,
    batch_limits: BatchLimits | None = None,
) -> FastAPI:
    """Return the server's ASGI application.

    Args:
        engine: scores the sequences. Nothing else may call it; the server closes it when it stops.
        token: bearer token that every request but /health must carry. None: no token is needed.
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
    app.add_middleware(AuthAndLimitMiddleware, token=token, body_bytes=limits.body_bytes, answered=answered)
    app.add_middleware(WeightsHeaderMiddleware, fingerprint=engine.info.weights_fingerprint)

    @app.exception_handler(RequestError)
    async def error_response(_: Request, error: RequestError) -> HttpResponse:
        return error.response

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not batcher.alive:
            raise RequestError(503, "the engine takes no requests")
        if batcher.failures >= MAX_FAILURES:
            raise RequestError(503, "the engine fails on every batch")
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> HttpResponse:
        return HttpResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/teacher")
    async def teacher() -> dict[str, Any]:
        head = engine.head_file
        return {
            **engine.info._asdict(),
            "hidden_size": None if head is None else head.head.weight.shape[1],
            "wire_version": VERSION,
            "limits": {**asdict(limits), "top_logprobs": min(limits.top_logprobs, engine.info.vocab_size)},
        }

    @app.api_route(HEAD_PATH, methods=["GET", "HEAD"])
    async def head() -> HttpResponse:
        if engine.head_file is None:
            raise RequestError(404, "this teacher's engine has no hidden_states")
        saved = await asyncio.to_thread(engine.head_file.saved)
        return FileResponse(saved.path, headers={"ETag": f'"{saved.sha256}"'})

    schema = {"content": {"application/json": {"schema": RequestBody.model_json_schema()}}, "required": True}

    @app.post(SCORE_PATH, openapi_extra={"requestBody": schema})
    async def get_sequence_logprobs(request: Request) -> HttpResponse:
        with seconds.time():
            try:
                return await asyncio.wait_for(respond(request), limits.request_seconds)
            except asyncio.TimeoutError:
                raise RequestError(504, f"no answer within {limits.request_seconds:g} s") from None

    async def respond(request: Request) -> HttpResponse:
        # Work that grows with the request runs in a thread, so that the event loop stays free.
        try:
            content = await request.body()
        except ClientDisconnect:
            raise RequestError(499, "the client has disconnected") from None
        body, sequences, options = await asyncio.to_thread(parse_request, content, engine, limits)
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
        return await asyncio.to_thread(_encode, result, body)

    return app


def _encode(result: Result, body: RequestBody) -> HttpResponse:
    if isinstance(result, HiddenStates):
        payload = encode_hidden(result, "float32" if body.dtype == "float32" else "bfloat16")
    elif body.response_format == "json":
        return JSONResponse(encode_json(result))
    else:
        payload = encode_binary(result, "float16" if body.dtype == "float16" else "float32")
    if body.response_format == "base64":
        return JSONResponse({"version": VERSION, "binary": base64.b64encode(payload).decode()})
    return HttpResponse(payload, media_type="application/octet-stream")


class AuthAndLimitMiddleware:
    """Check the bearer token and the size of the body before it is read, and count response statuses."""

    def __init__(self, app: ASGIApp, token: str | None, body_bytes: int, answered: Counter):
        self.app, self.body_bytes, self.answered = app, body_bytes, answered
        self.authorization = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == SCORE_PATH:
                self.answered.labels(str(message["status"])).inc()
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
        if length is not None and (not length.isdigit() or int(length) > self.body_bytes):
            return RequestError(413, f"the body must have at most {self.body_bytes} bytes")
        return None
