"""Faults over real sockets, counted: what was asked, answered, refused, lost, answered twice.

`pytest tests/test_serving_faults.py -s` prints the counts as a table.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cases import INTERPRETED
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import RetryPolicy
from fused_distill.serving.protocol import logprobs as wire
from fused_distill.serving.protocol.logprobs import TeacherLogprobs
from fused_distill.serving.server.app import RequestError, ServerLimits, create_app, parsed
from fused_distill.serving.server.batching import BatchLimits
from fused_distill.serving.server.transformers_engine import TransformersEngine
from test_serving import FakeEngine, Served, in_background, serving, waiting

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

PATIENT = RetryPolicy(attempts=200, first_wait_seconds=0.02, longest_wait_seconds=0.5)


@dataclass
class Row:
    """What became of the questions of one test."""

    fault: str
    asked: int = 0
    right: int = 0  # answered as they should be
    refused: int = 0  # times, as they should be
    lost: int = 0  # never answered
    double: int = 0  # whole answers beyond the first
    broken: int = 0  # connections that broke with a question on them


ROWS: list[Row] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print the rows as Markdown."""
    yield
    names = [field.name for field in fields(Row)]
    for line in (names, ["---"] * len(names), *(astuple(row) for row in ROWS)):
        print("|", " | ".join(map(str, line)), "|")


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Row]:
    """This test's row."""
    made = Row(request.node.name)
    yield made
    ROWS.append(made)
    for field in fields(Row):
        record_property(field.name, getattr(made, field.name))


class Watched(httpx.HTTPTransport):
    """Remembers what came back for each question, once it was there as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[bytes, list[int]] = {}
        self.waits: set[str | None] = set()  # Retry-After of refusals
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
        if request.url.path == wire.SCORE_PATH:
            with self.lock:
                self.statuses.setdefault(request.content, []).append(response.status_code)
                if response.status_code == 429:
                    self.waits.add(response.headers.get("retry-after"))
        return httpx.Response(response.status_code, headers=response.headers, content=content)

    def count(self, status: int) -> int:
        with self.lock:
            return sum(seen.count(status) for seen in self.statuses.values())

    def doubles(self) -> int:
        return sum(max(0, seen.count(200) - 1) for seen in self.statuses.values())


def wait_until(condition: Callable[[], bool], most_seconds: float = 30.0) -> None:
    until = time.monotonic() + most_seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def question(i: int) -> list[int]:
    """Three tokens below 1,000 that no other question has."""
    return [5, 20 + i // 500, 20 + i % 500]


def is_answer(answer: TeacherLogprobs, i: int) -> bool:
    """Whether this is what FakeEngine answers to that question."""
    return answer.actual_logprobs.tolist() == [-t for t in question(i)[1:]]


def ask_all(row: Row, count: int, threads: int, ask: Callable[[int], bool]) -> None:
    """Ask questions 0, 1, ... at once and note whether each was answered right; raising is losing it."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask, i) for i in range(count)]
    row.asked += count
    for future in futures:
        row.lost += future.exception() is not None
        row.right += future.exception() is None and future.result()


def asks(client: TeacherClient) -> Callable[[int], bool]:
    return lambda i: is_answer(client.get_sequence_logprobs([question(i)], [1]), i)


class FlakyEngine(FakeEngine):
    """Fails on every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[list[Any]] = []

    def score(self, batch: list[Any], execution: Any) -> Any:
        good = super().score(batch, execution)
        if len(self.batches) % 3 == 0:
            self.failed.append(batch)
            raise RuntimeError("a bad batch")
        return good


def test_a_failing_batch_fails_its_own_requests_and_retries_recover_them(row: Row) -> None:
    engine, watched = FlakyEngine(), Watched()
    limits = BatchLimits(batch_tokens=12)
    with (
        serving(engine, batch_limits=limits) as served,
        TeacherClient(served.url, concurrency=64, retries=PATIENT, transport=watched) as client,
    ):
        ask_all(row, 200, 16, asks(client))
    row.refused, row.double = watched.count(500), watched.doubles()
    # Every question failed just as often as it was in a failing batch.
    unlucky = Counter(sequence.tokens for batch in engine.failed for sequence in batch)
    failures = {tuple(json.loads(body)["sequences"][0]): s.count(500) for body, s in watched.statuses.items()}
    assert {tokens: n for tokens, n in failures.items() if n} == dict(unlucky)
    assert row == Row(row.fault, 200, 200, sum(unlucky.values()))
    assert row.refused > 0


def raw(served: Served, timeout: float = 60.0, small_window: bool = False) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(timeout)
    if small_window:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    return connection


def http_request(**body: Any) -> bytes:
    content = json.dumps({"response_format": "binary", **body}).encode()
    head = (
        f"POST {wire.SCORE_PATH} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def responses(stream: bytes) -> list[tuple[int, bytes]]:
    """Status and content of every response in the stream."""
    found: list[tuple[int, bytes]] = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        given = [int(x.split(b":")[1]) for x in lines if x.startswith(b"content-length:")]
        length = given[0] if given else len(stream)
        found.append((int(lines[0].split()[1]), stream[:length]))
        stream = stream[length:]
    return found


LONG = [5] * 1000  # with K 1,000 an answer of 8 MB: more than sockets hold


def is_long_answer(stream: bytes) -> bool:
    ((status, content),) = responses(stream)
    answer = wire.decode_binary(content)
    return status == 200 and answer.logprobs.shape == (999, 1000) and (answer.actual_logprobs == -5).all()


def test_slow_clients_hold_up_nobody(row: Row) -> None:
    others_are_done, begun, watched = threading.Event(), threading.Semaphore(0), Watched()
    with (
        serving(FakeEngine()) as served,
        TeacherClient(served.url, concurrency=8, transport=watched) as client,
    ):

        def read_slowly(_: int) -> bool:
            with raw(served, small_window=True) as connection:
                connection.sendall(http_request(sequences=[LONG], prompt_lengths=[1], top_logprobs=1000))
                stream = b"".join(connection.recv(3) for _ in range(20))
                begun.release()
                assert others_are_done.wait(60)
                return is_long_answer(stream + read_to_end(connection))

        def send_slowly(i: int) -> bool:
            whole = http_request(sequences=[question(i)], prompt_lengths=[1])
            with raw(served) as connection:
                connection.sendall(whole[:-30])
                begun.release()
                assert others_are_done.wait(60)
                for byte in whole[-30:]:
                    connection.sendall(bytes([byte]))
                ((status, content),) = responses(read_to_end(connection))
            return status == 200 and is_answer(wire.decode_binary(content), i)

        def slow(i: int) -> bool:
            return read_slowly(i) if i % 2 else send_slowly(i)

        slow_ones = Row("")
        thread = threading.Thread(target=ask_all, args=(slow_ones, 16, 16, slow))
        thread.start()
        for _ in range(16):
            assert begun.acquire(timeout=60)
        try:
            ask_all(row, 200, 8, asks(client))  # while sixteen are in the middle
        finally:
            others_are_done.set()
            thread.join(60)
    row.double = watched.doubles()
    assert row == Row(row.fault, 200, 200)
    assert slow_ones == Row("", 16, 16)
    row.asked, row.right = 216, 216


def test_clients_that_leave_free_their_places(row: Row) -> None:
    engine, watched, places = FakeEngine(), Watched(), 10
    engine.gate.clear()
    with (
        serving(engine, batch_limits=BatchLimits(max_waiting=places)) as served,
        TeacherClient(served.url, concurrency=64, retries=PATIENT, transport=watched) as client,
    ):
        ask = asks(client)
        with in_background(1, lambda _: ask(100)) as first, opened_at_last(engine):
            assert engine.started.wait(30)  # that one is in the engine and holds it
            leaving = [raw(served) for _ in range(places)]
            for connection in leaving:
                connection.sendall(http_request(sequences=[[999, 999]], prompt_lengths=[1]))
            wait_until(lambda: waiting(served.url) == places)
            for connection in leaving:
                connection.close()
            wait_until(lambda: waiting(served.url) == 0)
            for i in range(places):  # in the middle of their body; a half abort the connection
                with raw(served) as connection:
                    connection.sendall(http_request(sequences=[[999, 999]], prompt_lengths=[1])[:-5])
                    if i % 2:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Every place is free again.
            with in_background(places, lambda i: ask(200 + i)) as futures, opened_at_last(engine):
                wait_until(lambda: waiting(served.url) == places)
                engine.gate.set()
        row.right = sum(future.result() for future in [*first, *futures])
        for _ in range(places):  # in the middle of their answer
            with raw(served, small_window=True) as connection:
                connection.sendall(http_request(sequences=[LONG], prompt_lengths=[1], top_logprobs=1000))
                assert connection.recv(10)
        row.asked = 1 + places
        ask_all(row, 50, 8, ask)
        assert waiting(served.url) == 0
        row.refused = int(float(metric(served.url, 'teacher_requests_total{status="499"}')))
    assert all(999 not in sequence.tokens for batch, _ in engine.batches for sequence in batch)
    row.double = watched.doubles()
    assert row == Row(row.fault, 61, 61, row.refused)


@contextmanager
def opened_at_last(engine: FakeEngine) -> Iterator[None]:
    """Let the engine go on at an error, too."""
    try:
        yield
    finally:
        engine.gate.set()


def metric(url: str, name: str) -> str:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((line.split()[-1] for line in lines if line.startswith(f"{name} ")), "0")


def test_a_client_that_leaves_in_its_body_is_no_error_of_the_server() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": wire.SCORE_PATH, "query_string": b""}
    asyncio.run(create_app(FakeEngine())({**scope, "headers": [(b"content-length", b"9")]}, receive, send))


def test_a_client_that_never_sends_the_rest_is_dismissed(row: Row) -> None:
    with serving(FakeEngine(), limits=ServerLimits(request_seconds=0.3)) as served:

        def ask(i: int) -> bool:
            with raw(served) as connection:
                connection.sendall(http_request(sequences=[question(i)], prompt_lengths=[1])[:-5])
                return [status for status, _ in responses(read_to_end(connection))] == [504]

        ask_all(row, 20, 20, ask)
    row.refused, row.right = row.right, 0
    assert row == Row(row.fault, 20, 0, 20)


def test_a_full_queue_refuses_and_all_are_answered_in_the_end(row: Row) -> None:
    engine, watched = FakeEngine(), Watched()
    limits = BatchLimits(max_waiting=4, batch_tokens=12)
    with (
        serving(engine, batch_limits=limits) as served,
        TeacherClient(served.url, concurrency=64, retries=PATIENT, transport=watched) as client,
    ):
        ask_all(row, 100, 40, asks(client))
    row.refused, row.double = watched.count(429), watched.doubles()
    assert row.refused > 0
    assert watched.waits == {"1"}
    assert row == Row(row.fault, 100, 100, row.refused)


GOOD = {"sequences": [[1, 2, 3], [4, 5]], "prompt_lengths": [1, 0], "top_logprobs": 2, "temperature": 0.5}
MISFITS: list[Any] = [
    "",
    "x",
    [],
    {},
    [None],
    [[None]],
    [[[]]],
    -1,
    2**31,
    10**4000,
    1e300,
    True,
    [1.5],
    {"a": 1},
]


def garbage(generator: random.Random, i: int) -> bytes:
    """A body that is no request: bytes, a beginning, other JSON, a field that does not fit."""
    valid = json.dumps(GOOD).encode()
    kind = i % 4
    if kind == 0:
        return generator.randbytes(generator.randrange(300))
    if kind == 1:
        return valid[: generator.randrange(len(valid))]
    if kind == 2:
        return json.dumps(generator.choice(MISFITS)).encode()
    field = generator.choice([*GOOD, "score_ids", "response_format", "dtype", "else"])
    return json.dumps({**GOOD, field: generator.choice(MISFITS)}).encode()


def test_garbage_bodies_get_a_4xx_and_the_server_lives(row: Row) -> None:
    generator, engine = random.Random(0), FakeEngine()
    bodies = [garbage(generator, i) for i in range(1200)]
    statuses: Counter[int] = Counter()
    with serving(engine) as served, httpx.Client(timeout=60) as http:
        for body in bodies:
            response = http.post(served.url + wire.SCORE_PATH, content=body)
            statuses[response.status_code] += 1
        assert not engine.batches
        row.right = int(http.post(served.url + wire.SCORE_PATH, json=GOOD).status_code == 200)
    row.asked, row.refused = len(bodies) + 1, statuses[422]
    assert row == Row(row.fault, 1201, 1, 1200)


def test_bodies_with_changed_bytes_are_understood_or_get_a_4xx(row: Row) -> None:
    generator = random.Random(1)
    with serving(FakeEngine()) as served, httpx.Client(timeout=60) as http:
        for _ in range(600):
            body = bytearray(json.dumps(GOOD).encode())
            for _ in range(generator.randint(1, 3)):
                body[generator.randrange(len(body))] = generator.choice(b'0123456789,.[]{}":-e ntx\xff')
            response = http.post(served.url + wire.SCORE_PATH, content=bytes(body))
            row.asked += 1
            row.refused += response.status_code == 422
            if response.status_code == 200:
                lengths = wire.decode_json(response.json()).lengths.tolist()
                asked = json.loads(body)
                pairs = zip(asked["sequences"], asked["prompt_lengths"], strict=True)
                row.right += lengths == [wire.scored_positions(len(s), p) for s, p in pairs]
    assert row.right + row.refused == row.asked == 600
    assert row.right > 0


def test_what_is_not_http_gets_a_4xx_and_the_server_lives(row: Row) -> None:
    generator = random.Random(2)
    with serving(FakeEngine()) as served:
        for _ in range(200):
            with raw(served) as connection:
                connection.sendall(b"\0" + generator.randbytes(generator.randrange(1, 300)) + b"\r\n\r\n")
                found = responses(read_to_end(connection))
            row.asked += 1
            row.refused += [status for status, _ in found] == [400]
        assert httpx.get(f"{served.url}/health").status_code == 200
    assert row == Row(row.fault, 200, 0, 200)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {**GOOD, "score_ids": [[0] * 1000, []]},
            id="score_ids",
        ),
        pytest.param(
            {**GOOD, **{f"field {i}": 0 for i in range(1000)}},
            id="unknown fields",
        ),
        pytest.param({**GOOD, "sequences": [[-1] * 1000]}, id="sequences"),
        pytest.param({**GOOD, "prompt_lengths": [""] * 1000}, id="prompt_lengths"),
        pytest.param({**GOOD, "score_ids": [[[""] * 1000], []]}, id="ids of a position"),
    ],
)
def test_a_body_full_of_errors_makes_one_error(body: dict[str, Any]) -> None:
    # An error takes about 800 bytes while the request is looked at: 64 MB of them take 25 GB.
    with pytest.raises(RequestError) as refused:
        parsed(json.dumps(body).encode(), FakeEngine(), ServerLimits())
    found: Any = refused.value.__context__
    assert found is None or found.error_count() <= 2


@pytest.mark.parametrize(
    "body",
    [{**GOOD, "x" * 10**5: 1}, {**GOOD, "prompt_lengths": [10**4000, 1]}],
    ids=["long name", "long number"],
)
def test_a_refusal_is_short(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(json.dumps(body).encode(), FakeEngine(), ServerLimits())
    assert len(refused.value.response.body) < 1000


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def command(model: Path, port: int, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`fused-distill serve-teacher` in a process of its own, ready to answer."""
    arguments = [sys.executable, "-m", "fused_distill.cli", "serve-teacher", str(model), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("FUSED_DISTILL_TOKEN", None)
    process = subprocess.Popen(
        [*arguments, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, 120)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def texts(tiny_model: Path) -> list[tuple[list[int], TeacherLogprobs]]:
    """Sequences, and what the model says of each on its own."""
    engine = TransformersEngine.load(str(tiny_model), "cpu", "float32")
    generator = random.Random(3)
    made: list[tuple[list[int], TeacherLogprobs]] = []
    for _ in range(400):
        tokens = [generator.randrange(3, 90) for _ in range(generator.randint(3, 20))]
        sequences, execution = parsed(
            json.dumps({"sequences": [tokens], "prompt_lengths": [1], "top_logprobs": 5}).encode(),
            engine,
            ServerLimits(),
        )[1:]
        (answer,) = engine.score(sequences, execution)
        assert isinstance(answer, TeacherLogprobs)
        made.append((tokens, answer))
    return made


def same(got: TeacherLogprobs, want: TeacherLogprobs) -> bool:
    if got.lengths.tolist() != want.lengths.tolist():
        return False
    return all(
        np.allclose(a, b, atol=2e-5)
        for a, b in ((got.actual_logprobs, want.actual_logprobs), (got.logprobs, want.logprobs))
    )


def test_a_killed_and_restarted_server_loses_and_doubles_nothing(
    tiny_model: Path, texts: list[tuple[list[int], TeacherLogprobs]], row: Row
) -> None:
    watched, port = Watched(), unused_port()
    asking = threading.Thread()
    with TeacherClient(
        f"http://127.0.0.1:{port}",
        concurrency=16,
        retries=PATIENT,
        transport=watched,
        protocol="fused-distill",
    ) as client:

        def ask(i: int) -> bool:
            tokens, want = texts[i]
            return same(client.get_sequence_logprobs([tokens], [1], top_logprobs=5), want)

        with command(tiny_model, port) as (process, _):
            asking = threading.Thread(target=ask_all, args=(row, len(texts), 16, ask))
            asking.start()
            wait_until(lambda: watched.count(200) >= 80, 60)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        before = watched.count(200)
        with command(tiny_model, port):
            asking.join(120)
            assert not asking.is_alive()
    row.double, row.refused, row.broken = watched.doubles(), watched.unreachable, watched.broken
    assert before < len(texts)  # it was in the middle
    assert row.broken >= 1
    assert row == Row(row.fault, 400, 400, row.refused, 0, 0, row.broken)


def test_sigterm_answers_what_is_in_flight_and_refuses_what_is_new(
    tiny_model: Path, texts: list[tuple[list[int], TeacherLogprobs]], row: Row
) -> None:
    count, size, port = 20, 40, unused_port()
    with (
        command(tiny_model, port, "--batch-tokens", "64") as (process, url),
        httpx.Client(timeout=60) as http,
    ):

        def ask(i: int) -> bool:
            own = texts[i * 20 : i * 20 + size]
            body = {"sequences": [t for t, _ in own], "prompt_lengths": [1] * len(own), "top_logprobs": 5}
            response = http.post(url + wire.SCORE_PATH, json={**body, "response_format": "binary"})
            return same(
                wire.decode_binary(response.content), TeacherLogprobs.join([answer for _, answer in own])
            )

        asking = threading.Thread(target=ask_all, args=(row, count, count, ask))
        asking.start()
        wait_until(lambda: waiting(url) >= count - 1)
        process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            assert process.poll() is None, "the server ended before a connection was refused"
            try:
                socket.create_connection(("127.0.0.1", port), 60).close()
            except ConnectionRefusedError:
                return True
            return False

        wait_until(refused)
        row.refused = 1
        asking.join(120)
        process.wait(60)
    assert row == Row(row.fault, count, count, 1)


def test_a_server_that_was_asked_to_end_ends_well(tiny_model: Path) -> None:
    with command(tiny_model, unused_port()) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
