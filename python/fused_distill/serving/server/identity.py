"""The weights that a server answers with, told in a header of every answer."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.request import SCORE_PATH, WEIGHTS_HEADER


class WeightsHeaderMiddleware:
    """Add the fingerprint of the teacher's weights to every response of the scoring endpoint."""

    def __init__(self, app: ASGIApp, fingerprint: str | None):
        self.app = app
        self.headers = [] if fingerprint is None else [(WEIGHTS_HEADER.encode(), fingerprint.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        scores = scope["type"] == "http" and scope["path"] == SCORE_PATH
        await self.app(scope, receive, send_with_header if scores else send)
