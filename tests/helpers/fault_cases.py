"""Questions over real sockets, and counts of what became of them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary
from fused_distill.serving.protocol.request import SCORE_PATH
from serving_cases import FakeEngine, Served

LONG = [5] * 1000  # with K 1,000 a response of 8 MB: more than sockets hold


@dataclass
class FaultCounts:
    """What became of the questions of one test."""

    fault: str
    asked: int = 0
    right: int = 0  # answered as they should be
    refused: int = 0  # refusals, as they should be
    lost: int = 0  # never answered
    double: int = 0  # complete answers beyond the first
    broken: int = 0  # connections that broke with a question on them


class RecordingTransport(httpx.HTTPTransport):
    """Record the status of every complete response, by question."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[bytes, list[int]] = {}
        self.retry_after: set[str | None] = set()  # of refusals
        self.broken = self.unreachable = 0
        self.lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = super().handle_request(request)
            content = response.read()
        except httpx.TransportError as error:
            with self.lock:
                self.unreachable += isinstance(error, httpx.ConnectError)
                self.broken += not isinstance(error, httpx.ConnectError)
            raise
        if request.url.path == SCORE_PATH:
            with self.lock:
                self.statuses.setdefault(request.content, []).append(response.status_code)
                if response.status_code == 429:
                    self.retry_after.add(response.headers.get("retry-after"))
        return httpx.Response(response.status_code, headers=response.headers, content=content)

    def count(self, status: int) -> int:
        with self.lock:
            return sum(seen.count(status) for seen in self.statuses.values())

    def doubles(self) -> int:
        return sum(max(0, seen.count(200) - 1) for seen in self.statuses.values())


def question(i: int) -> list[int]:
    """Three tokens below 1,000 that no other question has."""
    return [5, 20 + i // 500, 20 + i % 500]


def is_answer(answer: TeacherLogprobs, i: int) -> bool:
    """True if this is FakeEngine's answer to question i."""
    return answer.actual_logprobs.tolist() == [-t for t in question(i)[1:]]


def ask_all(row: FaultCounts, count: int, threads: int, ask: Callable[[int], bool]) -> None:
    """Ask questions 0, 1, ... at once and count the right answers; a question that raises is lost."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask, i) for i in range(count)]
    row.asked += count
    for future in futures:
        row.lost += future.exception() is not None
        row.right += future.exception() is None and future.result()


def asks(client: TeacherClient) -> Callable[[int], bool]:
    return lambda i: is_answer(client.get_sequence_logprobs([question(i)], [1]), i)


def raw(served: Served, timeout: float = 60.0, small_window: bool = False) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(timeout)
    if small_window:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    return connection


def http_request(**body: object) -> bytes:
    content = json.dumps({"response_format": "binary", **body}).encode()
    head = f"POST {SCORE_PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def responses(stream: bytes) -> list[tuple[int, bytes]]:
    """Status and content of every response in the stream."""
    parsed: list[tuple[int, bytes]] = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
        length = lengths[0] if lengths else len(stream)
        parsed.append((int(lines[0].split()[1]), stream[:length]))
        stream = stream[length:]
    return parsed


def is_long_answer(stream: bytes) -> bool:
    """True if this is FakeEngine's answer to LONG with K 1,000."""
    ((status, content),) = responses(stream)
    answer = decode_binary(content)
    return status == 200 and answer.logprobs.shape == (999, 1000) and (answer.actual_logprobs == -5).all()


@contextmanager
def opened_at_last(engine: FakeEngine) -> Iterator[None]:
    """Release the engine at the end, after an error too."""
    try:
        yield
    finally:
        engine.gate.set()
