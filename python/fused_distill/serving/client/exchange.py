"""One request to one server, whose response is read no further than expected."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import IO

import httpx

from .session import Session

_ERROR_BYTES = 64 << 10  # an error response is read up to here
_LONGEST_TIMEOUT_SECONDS = 86400.0  # a socket's timeout has a limit


@dataclass(frozen=True)
class Request:
    """A request that any server may answer."""

    method: str
    path: str
    body: object  # sent as JSON
    deadline: float  # of time.monotonic()
    timeout_seconds: float  # between two bytes
    accepted: tuple[int, ...]  # statuses of a good response
    max_bytes: int  # of a good response's body
    file: IO[bytes] | None  # gets a good response's body; None: it is kept in memory

    def send(self, session: Session, server: str) -> httpx.Response:
        """Return the response of a server, given by its URL.

        Raises:
            ValueError: the body is compressed or larger than max_bytes. It is not read on.
            httpx.RequestError: no complete response came before the deadline.
        """
        left = min(max(0.001, self.deadline - time.monotonic()), _LONGEST_TIMEOUT_SECONDS)
        timeout = httpx.Timeout(min(left, self.timeout_seconds), connect=min(left, 10.0))
        with session.http.stream(
            self.method,
            server + self.path,
            json=self.body,
            timeout=timeout,
            extensions={"trace": session.trace},
        ) as response:
            content = self._read(response) if response.status_code in self.accepted else _read_error(response)
            headers = {k: v for k, v in response.headers.items() if k != "content-encoding"}
            return httpx.Response(
                response.status_code, headers=headers, content=content, request=response.request
            )

    def _read(self, response: httpx.Response) -> bytes:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ValueError(f"the response must not be compressed, got Content-Encoding {encoding!r}")
        length = response.headers.get("content-length", "0")
        if self.method != "HEAD" and length.isdigit() and int(length) > self.max_bytes:
            raise ValueError(f"the response must have at most {self.max_bytes} bytes, it announces {length}")
        content = io.BytesIO()
        sink = self.file or content
        sink.seek(0)
        sink.truncate()
        size = 0
        for chunk in response.iter_bytes():
            size += len(chunk)
            if size > self.max_bytes:
                raise ValueError(f"the response must have at most {self.max_bytes} bytes, got more")
            sink.write(chunk)
            if time.monotonic() > self.deadline:
                raise httpx.ReadTimeout("the deadline passed while the response arrived")
        return content.getvalue()


def _read_error(response: httpx.Response) -> bytes:
    """Return the beginning of an error response's body, as far as a message can use it."""
    if "content-encoding" in response.headers:
        return b""
    content = b""
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) >= _ERROR_BYTES:
            break
    return content[:_ERROR_BYTES]
