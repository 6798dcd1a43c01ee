"""The teacher server: log-probabilities of sequences over HTTP."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Request
from fastapi import Response as HttpResponse
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import ClientDisconnect

from ..protocol import logprobs as wire
from ..protocol.hidden_states import HiddenDtype, HiddenStates, encode_hidden
from ..protocol.logprobs import HEAD_PATH, SCORE_PATH
from ..protocol.packing import VERSION, to_base64
from ..protocol.request import Response, ScoringOptions, TokenSequence
from .batching import Batcher, BatchLimits, QueueFull, Stopped
from .transformers_engine import Capability, Result, TeacherEngine


class _FirstError(FailFast):
    """The first wrong element ends the check: a body full of them must not make a message for each."""

    def __hash__(self) -> int:  # unions of annotated types ask for it
        return id(self)


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], _FirstError()]


@dataclass(frozen=True)
class ServerLimits:
    """What one request may ask for, and how long it may take."""

    body_bytes: int = 64 << 20
    sequences: int = 512
    tokens: int = 1 << 20  # of all sequences together
    top_logprobs: int = 4096
    score_ids: int = 4096  # per position
    numbers: int = 1 << 26  # log-probabilities of one answer
    request_seconds: float = 300.0
    retry_after_seconds: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if max(self.top_logprobs, self.score_ids) > wire.MOST_K:
            raise ValueError(f"top_logprobs and score_ids must be at most {wire.MOST_K}")


class ScoreRequest(BaseModel):
    """Body of POST /get_sequence_logprobs/."""

    model_config = ConfigDict(extra="allow", strict=True)  # `parsed` refuses them, with one error for all

    sequences: Annotated[list[_Ids], Field(min_length=1), _FirstError()]
    prompt_lengths: Annotated[list[int], _FirstError()]
    top_logprobs: int = Field(1, ge=0)
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    score_ids: Annotated[list[Annotated[list[_Ids], _FirstError()]], _FirstError()] | None = (
        None  # per sequence, per position, M ids
    )
    vocab_size: int | None = Field(None, ge=1)  # columns of the head that are the vocabulary; null: all
    response: Response = "logprobs"
    response_format: wire.Format = "json"  # hidden states: binary or base64
    # Of the binary forms; None: float32, of hidden states bfloat16.
    dtype: wire.Dtype | HiddenDtype | None = None

    @property
    def hidden(self) -> bool:
        """Whether hidden states are asked for."""
        return self.response == "hidden_states"


_MOST_REASON = 500  # characters: it may quote what the client sent


class RequestError(Exception):
    """A request that gets no answer: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str, **headers: str):
        reason = reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]}..."
        super().__init__(reason)
        self.response = JSONResponse({"detail": reason}, status, headers)


def parsed(
    body: bytes, engine: TeacherEngine, limits: ServerLimits
) -> tuple[ScoreRequest, list[TokenSequence], ScoringOptions]:
    """A request and what the engine is to do for it.

    Raises:
        RequestError: 422, naming a field that does not fit and its index.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise RequestError(422, f"{where}: {first['msg']}") from None
    if request.model_extra:
        raise RequestError(422, f"{next(iter(request.model_extra))}: no such field")
    try:
        return request, *_work(request, engine, limits)
    except ValueError as error:
        raise RequestError(422, str(error)) from None


def _work(
    request: ScoreRequest, engine: TeacherEngine, limits: ServerLimits
) -> tuple[list[TokenSequence], ScoringOptions]:
    sequences, prompt_lengths, info = request.sequences, request.prompt_lengths, engine.info
    _check_options(request, info.capabilities)
    if len(sequences) > limits.sequences:
        raise ValueError(f"sequences must be at most {limits.sequences}, got {len(sequences)}")
    total = sum(map(len, sequences))
    if total > limits.tokens:
        raise ValueError(f"sequences must hold at most {limits.tokens} tokens in all, got {total}")
    scores = request.score_ids
    wire.check_request(sequences, prompt_lengths, scores)
    vocab_size = request.vocab_size or info.vocab_size
    if vocab_size > info.vocab_size:
        raise ValueError(f"vocab_size must be at most {info.vocab_size}, got {vocab_size}")
    most = min(limits.top_logprobs, vocab_size)
    if request.top_logprobs > most:
        raise ValueError(f"top_logprobs must be at most {most}, got {request.top_logprobs}")
    width = 1 + request.top_logprobs  # numbers of one position
    if engine.head_file is not None and request.hidden:
        width = engine.head_file.head.weight.shape[1]

    items: list[TokenSequence] = []
    widths: set[int] = set()
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= len(tokens) <= info.max_length:
            raise ValueError(f"sequences[{i}] must have 1 to {info.max_length} tokens, got {len(tokens)}")
        if max(tokens) >= vocab_size:
            raise ValueError(f"sequences[{i}] must hold ids below {vocab_size}, got {max(tokens)}")
        own = None if scores is None else tuple(map(tuple, scores[i]))
        items.append(TokenSequence(tuple(tokens), prompt_length, own))
        if own is not None:
            if len(own) != items[i].positions:
                raise ValueError(f"score_ids[{i}] must have {items[i].positions} positions, got {len(own)}")
            widths |= set(map(len, own))
            highest = max((max(ids, default=0) for ids in own), default=0)
            if highest >= vocab_size:
                raise ValueError(f"score_ids[{i}] must hold ids below {vocab_size}, got {highest}")
    count = max(widths, default=0)
    if len(widths) > 1 or count > limits.score_ids:
        raise ValueError(
            f"score_ids must hold the same number of ids, at most {limits.score_ids}, at every position, "
            f"got {sorted(widths)[:5]}"
        )
    numbers = sum(item.positions for item in items) * (width + count)
    if numbers > limits.numbers:
        raise ValueError(f"sequences must ask for at most {limits.numbers} numbers in all, got {numbers}")
    score_count = None if scores is None else count
    return items, ScoringOptions(
        request.top_logprobs, score_count, request.temperature, request.response, request.vocab_size
    )


def _check_options(request: ScoreRequest, capabilities: tuple[Capability, ...]) -> None:
    asked: dict[Capability, tuple[str, bool]] = {
        "temperature": (f"temperature must be 1, got {request.temperature}", request.temperature != 1),
        "score_ids": ("score_ids must be null", request.score_ids is not None),
        "vocab_size": (f"vocab_size must be null, got {request.vocab_size}", request.vocab_size is not None),
        "hidden_states": ("response must be 'logprobs', got 'hidden_states'", request.hidden),
    }
    for capability, (message, wanted) in asked.items():
        if wanted and capability not in capabilities:
            raise ValueError(f"{message}: this teacher's engine has no {capability}")
    dtypes = get_args(HiddenDtype if request.hidden else wire.Dtype)
    if request.dtype is not None and request.dtype not in dtypes:
        raise ValueError(f"dtype must be one of {dtypes} for {request.response}, got {request.dtype!r}")
    if not request.hidden:
        return
    if request.response_format == "json":
        raise ValueError("response_format must be 'binary' or 'base64' for hidden states, got 'json'")
    given = request.model_fields_set & {"top_logprobs", "temperature", "score_ids", "vocab_size"}
    if given:
        raise ValueError(f"{min(given)} must not be given for hidden states, which hold all of it")


class _Metrics:
    def __init__(self, batcher: Batcher, limits: ServerLimits):
        self.registry = CollectorRegistry()
        self.requests = Counter("teacher_requests", "Requests by status", ["status"], registry=self.registry)
        self.positions = Counter("teacher_positions", "Positions scored", registry=self.registry)
        self.seconds = Histogram(
            "teacher_request_seconds",
            "From a request to its answer",
            buckets=[limits.request_seconds * 2**-i for i in reversed(range(16))],
            registry=self.registry,
        )
        waiting = Gauge(
            "teacher_waiting_requests", "Requests with sequences that wait", registry=self.registry
        )
        waiting.set_function(lambda: len(batcher.queue))
        running = Gauge("teacher_running_sequences", "Sequences in the engine", registry=self.registry)
        running.set_function(lambda: batcher.running)


class _Guard:
    """ASGI middleware: the bearer token, the body's size before it is read, a count of every status."""

    def __init__(self, app: Any, token: bytes | None, limits: ServerLimits, metrics: _Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.authorization = None if token is None else b"Bearer " + token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start" and scope["path"] == SCORE_PATH:
                self.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], dict(scope["headers"]))
        await (self.app if refusal is None else refusal.response)(scope, receive, counted)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        given = headers.get(b"authorization", b"")
        needed = None if path == "/health" else self.authorization
        if needed is not None and not secrets.compare_digest(given, needed):
            return RequestError(401, "a bearer token is needed", **{"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers or (method == "POST" and length is None):
            return RequestError(411, "the body must come with Content-Length")
        if length is not None and (not length.isdigit() or int(length) > self.limits.body_bytes):
            return RequestError(413, f"the body must have at most {self.limits.body_bytes} bytes")
        return None


def check_token(token: str | None) -> None:
    """Raises ValueError for an empty one."""
    if token is not None and not token.strip():
        raise ValueError("token must not be empty")


def create_app(
    engine: TeacherEngine,
    *,
    token: str | None = None,
    limits: ServerLimits | None = None,
    batch_limits: BatchLimits | None = None,
) -> FastAPI:
    """The server's ASGI application.

    Args:
        engine: scores the sequences; nothing else calls it, and it is closed with the server.
        token: bearer token that every request but /health must carry. None: none.
        limits: of a request.
        batch_limits: of waiting and batching.

    Raises:
        ValueError: an empty token.
    """
    check_token(token)
    limits = limits or ServerLimits()
    batcher = Batcher(engine, batch_limits)
    metrics = _Metrics(batcher, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with batcher:
                yield
        finally:
            engine.close()

    app = FastAPI(title="fused-distill teacher", lifespan=lifespan)
    app.add_middleware(
        _Guard, token=None if token is None else token.encode(), limits=limits, metrics=metrics
    )  # pyright: ignore[reportArgumentType]

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> HttpResponse:
        return error.response

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not batcher.alive:
            raise RequestError(503, "the engine takes no requests")
        if batcher.failing:
            raise RequestError(503, "the engine fails on every batch")
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> HttpResponse:
        return HttpResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/teacher")
    async def teacher() -> dict[str, Any]:
        most = min(limits.top_logprobs, engine.info.vocab_size)
        head = engine.head_file
        return {
            **engine.info._asdict(),
            "hidden_size": None if head is None else head.head.weight.shape[1],
            "wire_version": VERSION,
            "limits": {**asdict(limits), "top_logprobs": most},
        }

    @app.api_route(HEAD_PATH, methods=["GET", "HEAD"])
    async def head() -> HttpResponse:
        if engine.head_file is None:
            raise RequestError(404, "this teacher's engine has no hidden_states")
        saved = await asyncio.to_thread(engine.head_file.saved)
        return FileResponse(saved.path, headers={"ETag": f'"{saved.sha256}"'})

    schema = {"content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}, "required": True}

    @app.post(SCORE_PATH, openapi_extra={"requestBody": schema})
    async def get_sequence_logprobs(request: Request) -> HttpResponse:
        with metrics.seconds.time():
            answering = asyncio.create_task(answer(request))
            try:
                return await asyncio.wait_for(answering, limits.request_seconds)
            except asyncio.TimeoutError:
                raise RequestError(504, f"no answer within {limits.request_seconds:g} s") from None

    async def answer(request: Request) -> HttpResponse:
        # Whatever grows with the request runs in a thread: the loop must stay free for everybody else.
        try:
            body = await request.body()
        except ClientDisconnect:
            raise RequestError(499, "the client has gone") from None
        asked, sequences, execution = await asyncio.to_thread(parsed, body, engine, limits)
        scoring = asyncio.create_task(batcher.submit(sequences, execution))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((scoring, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not scoring.done():
                raise RequestError(499, "the client has gone")
            result = scoring.result()
        except QueueFull as error:
            raise RequestError(429, str(error), **{"Retry-After": str(limits.retry_after_seconds)}) from None
        except Stopped:
            raise RequestError(503, "the server is stopping") from None
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(500, f"the engine failed: {type(error).__name__}: {error}") from error
        finally:
            scoring.cancel()
            leaving.cancel()
        metrics.positions.inc(int(result.lengths.sum()))
        return await asyncio.to_thread(_encoded, result, asked)

    return app


async def _disconnected(request: Request) -> None:
    """Return when the client has gone: after the body nothing else can be received."""
    await request.receive()


def _encoded(answer: Result, asked: ScoreRequest) -> HttpResponse:
    content: dict[str, Any]
    if isinstance(answer, wire.TeacherLogprobs) and asked.response_format == "json":
        content = wire.encode_json(answer)
    else:
        payload = _payload(answer, asked)
        if asked.response_format == "binary":
            return HttpResponse(payload, media_type="application/octet-stream")
        content = to_base64(payload)
    return HttpResponse(json.dumps(content, separators=(",", ":")), media_type="application/json")


def _payload(answer: Result, asked: ScoreRequest) -> bytes:
    dtype = asked.dtype
    if isinstance(answer, HiddenStates):
        return encode_hidden(answer, "float32" if dtype == "float32" else "bfloat16")
    return wire.encode_binary(answer, "float16" if dtype == "float16" else "float32")
