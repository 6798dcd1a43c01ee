"""OpenAPI descriptions that FastAPI cannot derive: bodies that are read by hand, and all statuses."""

from __future__ import annotations

from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from .validation import RequestBody

_ERRORS = {
    401: "the bearer token is missing or wrong",
    404: "this engine has no hidden states",
    411: "no Content-Length",
    413: "the body is too large",
    421: "without a token: the Host header names another server",
    422: "a field is invalid",
    429: "the queue is full",
    499: "the client has disconnected",
    500: "the engine failed on this batch",
    503: "the server is shutting down, its engine fails on every batch, or all bodies are too large together",
    504: "no answer within the server's time limit",
}


class ErrorBody(BaseModel):
    """Body of every error."""

    detail: str


def responses(*errors: int, content: str | None = None, with_json: bool = False) -> dict[int | str, Any]:
    """Return the descriptions of an endpoint's responses.

    Args:
        errors: statuses.
        content: media type of a good response that is not JSON.
        with_json: a good response may also be a JSON object.
    """
    described: dict[int | str, Any] = {
        status: {"model": ErrorBody, "description": _ERRORS[status]} for status in (421, *errors)
    }
    if content is not None:
        text = content.startswith("text/")
        media: dict[str, Any] = {content: {"schema": {"type": "string", **({} if text else _BINARY)}}}
        if with_json:
            media["application/json"] = {"schema": {"type": "object"}}
        described[200] = {"description": "OK", "content": media}
    return described


def request_body() -> dict[str, Any]:
    """Return the description of the body of a scoring request."""
    schema = {**RequestBody.model_json_schema(), "additionalProperties": False}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def bearer(token: str | None) -> list[Any]:
    """Return the dependencies that describe the token. The middleware checks it, before any route runs."""
    return [] if token is None else [Depends(HTTPBearer(auto_error=False))]


_BINARY = {"format": "binary"}
