"""Validation of request bodies: limits, the body's fields, and what the engine has to do for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, get_args

import numpy as np
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..protocol.hidden_states import HiddenDtype
from ..protocol.logprobs import Dtype, Format
from ..protocol.request import Response, ScoringOptions, TokenSequence, check_request
from .engine import Capability, TeacherEngine
from .json_body import Counts, FirstError, IdList, Ids, take_id_lists

MAX_REASON_CHARS = 500  # an error message may quote what the client sent


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one request."""

    body_bytes: int = 64 << 20
    bodies_bytes: int = 256 << 20  # received and not yet answered, of all requests together
    sequences: int = 512
    tokens: int = 1 << 20  # of all sequences together
    top_logprobs: int = 4096
    score_ids: int = 4096  # per position
    numbers: int = 1 << 26  # values in one response
    json_numbers: int = 1 << 22  # values in one response with response_format "json"
    request_seconds: float = 300.0
    retry_after_seconds: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


class RequestBody(BaseModel):
    """Body of POST /get_sequence_logprobs/."""

    model_config = ConfigDict(
        extra="allow", strict=True, arbitrary_types_allowed=True
    )  # parse_request reports the first extra field

    sequences: Annotated[list[Ids], Field(min_length=1), FirstError()]
    prompt_lengths: Counts
    top_logprobs: int = Field(1, ge=0)
    temperature: float = Field(1.0, ge=1e-3, le=1e3, allow_inf_nan=False)
    score_ids: Annotated[list[Annotated[list[Ids], FirstError()]], FirstError()] | None = Field(
        None, description="M token ids per sequence and position"
    )
    vocab_size: int | None = Field(
        None, ge=1, description="take the distribution over the first vocab_size tokens; null: over all"
    )
    response: Response = "logprobs"
    response_format: Format = Field("json", description="binary or base64 for hidden states")
    dtype: Dtype | HiddenDtype | None = Field(
        None, description="of binary and base64 responses; null: float32, of hidden states bfloat16"
    )


class RequestError(Exception):
    """An HTTP error response: status and reason."""

    def __init__(self, status: int, reason: str, **headers: str):
        if len(reason) > MAX_REASON_CHARS:
            reason = f"{reason[:MAX_REASON_CHARS]}..."
        super().__init__(reason)
        self.response = JSONResponse({"detail": reason}, status, headers)


def parse_request(
    body: bytes, engine: TeacherEngine, limits: ServerLimits
) -> tuple[RequestBody, list[TokenSequence], ScoringOptions]:
    """Return a request with its sequences and scoring options.

    Raises:
        RequestError: a field is invalid (status 422; the reason names the field and the index).
    """
    try:
        max_lists = 2 * (1 + limits.sequences) + 1 + limits.tokens
        rest, taken = take_id_lists(body, max_lists, max(limits.tokens, limits.score_ids))
        request = RequestBody.model_validate_json(rest, context=taken)
        if request.model_extra:
            name = next(iter(request.model_extra))
            shown = name if name.encode() in body else "body"  # a name may hold a list's number instead of it
            raise RequestError(422, f"{shown}: unknown field")
        return request, *_validate(request, engine, limits)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise RequestError(422, f"{field}: {first['msg']}") from None
    except ValueError as error:
        raise RequestError(422, str(error)) from None


def _validate(
    request: RequestBody, engine: TeacherEngine, limits: ServerLimits
) -> tuple[list[TokenSequence], ScoringOptions]:
    sequences, prompt_lengths, scores = request.sequences, request.prompt_lengths, request.score_ids
    info = engine.info
    _check_options(request, info.capabilities)
    _require_at_most(limits.sequences, "sequences", len(sequences))
    _require_at_most(limits.tokens, "sequences", sum(map(len, sequences)), " tokens in all")
    check_request(sequences, prompt_lengths, scores)
    vocab_size = request.vocab_size or info.vocab_size
    _require_at_most(info.vocab_size, "vocab_size", vocab_size)
    _require_at_most(min(limits.top_logprobs, vocab_size), "top_logprobs", request.top_logprobs)

    items: list[TokenSequence] = []
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= len(tokens) <= info.max_length:
            raise ValueError(f"sequences[{i}] must have 1 to {info.max_length} tokens, got {len(tokens)}")
        _check_ids(f"sequences[{i}]", [tokens], vocab_size)
        item = TokenSequence(tuple(tokens.tolist()), prompt_length)
        if scores is not None:
            if len(scores[i]) != item.positions:
                raise ValueError(f"score_ids[{i}] must have {item.positions} positions, got {len(scores[i])}")
            _check_ids(f"score_ids[{i}]", scores[i], vocab_size)
        items.append(item)
    score_count = _score_count(scores, limits)
    width = 1 + request.top_logprobs + (score_count or 0)
    if engine.head_file is not None and request.response == "hidden_states":
        width = engine.head_file.head.weight.shape[1]
    _check_numbers(sum(item.positions for item in items) * width, request, limits)
    if scores is not None:  # within the limits, these arrays are as large as the answer at most
        items = [
            replace(item, score_ids=np.array(rows, dtype=np.int32).reshape(item.positions, score_count or 0))
            for item, rows in zip(items, scores, strict=True)
        ]
    return items, ScoringOptions(
        request.top_logprobs, score_count, request.temperature, request.response, request.vocab_size
    )


def _score_count(scores: list[list[IdList]] | None, limits: ServerLimits) -> int | None:
    """Return the number of score ids per position, None without score ids."""
    if scores is None:
        return None
    counts = {len(ids) for rows in scores for ids in rows}
    if len(counts) > 1:
        raise ValueError(f"score_ids must have as many ids at every position, got {sorted(counts)[:5]}")
    count = max(counts, default=0)
    _require_at_most(limits.score_ids, "score_ids", count, " per position")
    return count


def _check_numbers(numbers: int, request: RequestBody, limits: ServerLimits) -> None:
    _require_at_most(limits.numbers, "sequences", numbers, " numbers in the response")
    if request.response_format == "json" and numbers > limits.json_numbers:
        raise ValueError(
            f"response_format must be 'binary' or 'base64' for more than {limits.json_numbers} numbers, "
            f"got 'json' for {numbers}"
        )


def _require_at_most(limit: int, name: str, value: int, unit: str = "") -> None:
    if value > limit:
        raise ValueError(f"{name} must be at most {limit}{unit}, got {value}")


def _check_ids(name: str, lists: list[IdList], vocab_size: int) -> None:
    highest = max((int(ids.max(initial=0)) for ids in lists), default=0)
    if highest >= vocab_size:
        raise ValueError(f"{name} must hold ids below {vocab_size}, got {highest}")


def _check_options(request: RequestBody, capabilities: tuple[Capability, ...]) -> None:
    hidden = request.response == "hidden_states"
    for field in ("temperature", "score_ids", "vocab_size", "response"):
        capability = "hidden_states" if field == "response" else field
        is_default = getattr(request, field) == RequestBody.model_fields[field].default
        if not is_default and capability not in capabilities:
            raise ValueError(f"{field} must have its default: this teacher's engine has no {capability}")
    dtypes = get_args(HiddenDtype if hidden else Dtype)
    if request.dtype is not None and request.dtype not in dtypes:
        raise ValueError(f"dtype must be one of {dtypes} for {request.response}, got {request.dtype!r}")
    if hidden and request.response_format == "json":
        raise ValueError("response_format must be 'binary' or 'base64' for hidden states, got 'json'")
    options = request.model_fields_set & {"top_logprobs", "temperature", "score_ids", "vocab_size"}
    if hidden and options:
        raise ValueError(f"{min(options)} must not be given for hidden states, which do not depend on it")
