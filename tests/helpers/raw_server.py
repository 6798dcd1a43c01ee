"""A server that writes to its sockets itself, for faults that no web framework produces."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import repeat

from serving_cases import DESCRIPTION

_DESCRIPTIONS = {"/v1/teacher": DESCRIPTION, "/v1/models": {"data": [{"id": "m"}]}}
_TOO_MUCH = 64 << 20  # an endless response ends here, to spare the machine


@dataclass
class Received:
    """A request that the server has read to its end."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: socket.socket
    written: int = 0  # bytes of an endless response that were written


class RawServer(AbstractContextManager["RawServer"]):
    """Call `handle` with every request; what it returns is written to the connection.

    Descriptions, at /v1/teacher and /v1/models, are answered first, unless `handle` is to answer them too.
    """

    def __init__(self, handle: Callable[[Received], bytes], describes: bool = True):
        self.handle, self.describes = handle, describes
        self.received: list[Received] = []
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        for connection in (self._listener, *self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("rb") as stream:  # until the client leaves
            while line := stream.readline():
                method, path, _ = line.decode().split()
                fields = iter(stream.readline, b"\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (f.decode().partition(":") for f in fields)}
                body = stream.read(int(headers.get("content-length", "0")))
                request = Received(method, path, headers, body, connection)
                if path in _DESCRIPTIONS and self.describes:
                    connection.sendall(http_response(json.dumps(_DESCRIPTIONS[path]).encode()))
                    continue
                self.received.append(request)
                connection.sendall(self.handle(request))


def http_response(content: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A response; underscores in the names of headers stand for hyphens."""
    fields = {"Content_Length": str(len(content)), **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def stuck(request: Received) -> bytes:
    """Never answer; returns when the client has left."""
    request.connection.recv(1)
    return b""


def endless(status: str = "200 OK") -> Callable[[Received], bytes]:
    """Return a handler whose responses go on until the client leaves."""

    def handle(request: Received) -> bytes:
        piece = b"x" * (1 << 20)
        request.connection.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
        for _ in repeat(None, _TOO_MUCH // len(piece)):
            request.connection.sendall(piece)
            request.written += len(piece)
        request.connection.close()
        return b""

    return handle
