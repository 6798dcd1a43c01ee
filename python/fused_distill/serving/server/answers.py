"""HTTP responses to scoring requests, encoded and sent in pieces."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from ..protocol.hidden_states import HiddenStates, encode_hidden
from ..protocol.json_form import json_pieces
from ..protocol.logprobs import encode_binary
from ..protocol.packing import VERSION
from .engine import Result
from .validation import RequestBody

_SENT_BYTES = 1 << 20
_BASE64_BYTES = 3 << 18  # a multiple of 3, so that the pieces' base64 forms follow each other


class PiecewiseResponse(HttpResponse):
    """Send the content in pieces, each when the connection has room for it.

    A single large message would be copied several times by the HTTP server while nothing else runs.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        content = memoryview(self.body)
        for start in range(0, len(content), _SENT_BYTES):
            piece = content[start : start + _SENT_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def encode_answer(result: Result, body: RequestBody) -> HttpResponse:
    """Return the response with a result in the form and dtype that the request asks for."""
    if isinstance(result, HiddenStates):
        payload = encode_hidden(result, "float32" if body.dtype == "float32" else "bfloat16")
    elif body.response_format == "json":
        return PiecewiseResponse(b"".join(json_pieces(result)), media_type="application/json")
    else:
        payload = encode_binary(result, "float16" if body.dtype == "float16" else "float32")
    if body.response_format == "base64":
        return PiecewiseResponse(b"".join(_base64_pieces(payload)), media_type="application/json")
    return PiecewiseResponse(payload, media_type="application/octet-stream")


def _base64_pieces(payload: bytes) -> Iterator[bytes]:
    yield b'{"version":%d,"binary":"' % VERSION
    content = memoryview(payload)
    for start in range(0, len(content), _BASE64_BYTES):
        yield base64.b64encode(content[start : start + _BASE64_BYTES])
    yield b'"}'
