"""The teacher server: log-probabilities of sequences over HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from . import wire
from .batching import Batcher, BatchLimits, QueueFull
from .engine import Execution, Sequence, TeacherEngine

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class ServerLimits:
    """What one request may ask for, and how long it may take."""

    body_bytes: int = 64 << 20
    sequences: int = 512
    top_logprobs: int = 4096
    score_ids: int = 4096  # per position
    request_seconds: float = 300.0
    retry_after_seconds: int = 1


class ScoreRequest(BaseModel):
    """Body of POST /get_sequence_logprobs/."""

    model_config = ConfigDict(extra="forbid")

    sequences: list[list[TokenId]] = Field(min_length=1)
    prompt_lengths: list[int]
    top_logprobs: int = Field(1, ge=0)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    score_ids: list[list[list[TokenId]]] | None = None  # per sequence, per position, M ids
    response_format: wire.Format = "json"
    dtype: wire.Dtype = "float32"  # of the binary forms


class RequestError(ValueError):
    """A request that does not fit the teacher; the message names the field and the index."""


def checked(
    request: ScoreRequest, engine: TeacherEngine, limits: ServerLimits
) -> tuple[list[Sequence], Execution]:
    """What the engine is to do.

    Raises:
        RequestError: a field that does not fit, by name and index.
    """
    sequences, prompt_lengths, info = request.sequences, request.prompt_lengths, engine.info
    if len(sequences) > limits.sequences:
        raise RequestError(f"sequences must be at most {limits.sequences}, got {len(sequences)}")
    if len(prompt_lengths) != len(sequences):
        raise RequestError(
            f"prompt_lengths must be {len(sequences)}, one a sequence, got {len(prompt_lengths)}"
        )
    most = min(limits.top_logprobs, info.vocab_size)
    if request.top_logprobs > most:
        raise RequestError(f"top_logprobs must be at most {most}, got {request.top_logprobs}")
    scores = request.score_ids
    if scores is not None and len(scores) != len(sequences):
        raise RequestError(f"score_ids must be {len(sequences)}, one a sequence, got {len(scores)}")

    items: list[Sequence] = []
    widths: set[int] = set()
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 0 <= prompt_length <= len(tokens):
            raise RequestError(
                f"prompt_lengths[{i}] must be between 0 and the sequence's {len(tokens)} tokens, "
                f"got {prompt_length}"
            )
        if not 1 <= len(tokens) <= info.max_length:
            raise RequestError(f"sequences[{i}] must have 1 to {info.max_length} tokens, got {len(tokens)}")
        if max(tokens) >= info.vocab_size:
            raise RequestError(f"sequences[{i}] must hold ids below {info.vocab_size}, got {max(tokens)}")
        own = None if scores is None else scores[i]
        item = Sequence(tuple(tokens), prompt_length, None if own is None else tuple(map(tuple, own)))
        if own is not None:
            if len(own) != item.positions:
                raise RequestError(f"score_ids[{i}] must have {item.positions} positions, got {len(own)}")
            widths |= {len(ids) for ids in own}
            highest = max((max(ids, default=0) for ids in own), default=0)
            if highest >= info.vocab_size:
                raise RequestError(f"score_ids[{i}] must hold ids below {info.vocab_size}, got {highest}")
        items.append(item)
    if len(widths) > 1 or max(widths, default=0) > limits.score_ids:
        raise RequestError(
            f"score_ids must hold the same number of ids, at most {limits.score_ids}, at every position, "
            f"got {sorted(widths)[:5]}"
        )
    count = None if scores is None else max(widths, default=0)
    return items, Execution(request.top_logprobs, count, request.temperature)


class _Metrics:
    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        self.requests = Counter("teacher_requests", "Requests by status", ["status"], registry=self.registry)
        self.positions = Counter("teacher_positions", "Positions scored", registry=self.registry)
        self.seconds = Histogram(
            "teacher_request_seconds", "From a request to its answer", registry=self.registry
        )
        waiting = Gauge("teacher_waiting_requests", "Requests without a batch yet", registry=self.registry)
        waiting.set_function(lambda: len(batcher.waiting))
        running = Gauge("teacher_running_requests", "Requests in the engine", registry=self.registry)
        running.set_function(lambda: batcher.running)


def create_app(
    engine: TeacherEngine,
    *,
    token: str | None = None,
    limits: ServerLimits | None = None,
    batch_limits: BatchLimits | None = None,
) -> FastAPI:
    """The server's ASGI application.

    Args:
        engine: scores the sequences; nothing else calls it.
        token: bearer token that every request but /health must carry. None: none.
        limits: of a request.
        batch_limits: of waiting and batching.
    """
    limits = limits or ServerLimits()
    batcher = Batcher(engine, batch_limits)
    metrics = _Metrics(batcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="fused-distill teacher", lifespan=lifespan)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token is not None and request.url.path != "/health":
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return JSONResponse(
                    {"detail": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"}
                )
        length = request.headers.get("content-length")
        if request.method == "POST" and length is None:
            return JSONResponse({"detail": "Content-Length is needed"}, 411)
        if length is not None and (not length.isdigit() or int(length) > limits.body_bytes):
            return JSONResponse({"detail": f"the body must have at most {limits.body_bytes} bytes"}, 413)
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/teacher")
    async def teacher() -> dict[str, object]:
        return {
            **engine.info._asdict(),
            "wire_version": wire.VERSION,
            "max_sequences": limits.sequences,
            "max_top_logprobs": min(limits.top_logprobs, engine.info.vocab_size),
            "max_score_ids": limits.score_ids,
            "max_body_bytes": limits.body_bytes,
        }

    @app.post("/get_sequence_logprobs/")
    async def get_sequence_logprobs(request: Request, body: ScoreRequest) -> Response:
        with metrics.seconds.time():
            try:
                answer = await _answer(request, body)
            except HTTPException as error:
                metrics.requests.labels(str(error.status_code)).inc()
                raise
        metrics.requests.labels("200").inc()
        metrics.positions.inc(len(answer.actual_logprobs))
        if body.response_format == "binary":
            payload = await asyncio.to_thread(wire.encode_binary, answer, body.dtype)
            return Response(payload, media_type="application/octet-stream")
        if body.response_format == "base64":
            return JSONResponse(await asyncio.to_thread(wire.encode_base64, answer, body.dtype))
        return JSONResponse(await asyncio.to_thread(wire.encode_json, answer))

    async def _answer(request: Request, body: ScoreRequest) -> wire.Answer:
        try:
            sequences, execution = checked(body, engine, limits)
        except RequestError as error:
            raise HTTPException(422, str(error)) from None
        scoring = asyncio.create_task(batcher.submit(sequences, execution))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait(
                (scoring, leaving), timeout=limits.request_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if scoring.done():
                return scoring.result()
            if leaving.done():
                raise HTTPException(499, "the client has gone")
            raise HTTPException(504, f"no answer within {limits.request_seconds:g} s")
        except QueueFull as error:
            headers = {"Retry-After": str(limits.retry_after_seconds)}
            raise HTTPException(429, str(error), headers) from None
        except HTTPException:
            raise
        except Exception as error:
            raise HTTPException(500, f"the engine failed: {type(error).__name__}: {error}") from error
        finally:
            scoring.cancel()
            leaving.cancel()

    return app


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
