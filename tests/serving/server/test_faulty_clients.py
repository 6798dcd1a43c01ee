"""Faulty clients and engines over real sockets, with every question and answer counted."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from typing import Any

from fault_cases import (
    LONG,
    FaultCounts,
    RecordingTransport,
    ask_all,
    asks,
    http_request,
    is_answer,
    is_long_answer,
    opened_at_last,
    question,
    raw,
    read_to_end,
    responses,
)
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.protocol.logprobs import decode_binary
from fused_distill.serving.protocol.request import SCORE_PATH
from fused_distill.serving.server.app import create_app
from fused_distill.serving.server.batching import BatchLimits
from fused_distill.serving.server.connections import ConnectionLimits
from fused_distill.serving.server.validation import ServerLimits
from limits import seconds
from serving_cases import (
    FakeEngine,
    in_background,
    metric,
    serving,
    wait_until,
    waiting_requests,
)


class FlakyEngine(FakeEngine):
    """Fails on every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[list[Any]] = []

    def score(self, batch: list[Any], options: Any) -> Any:
        good = super().score(batch, options)
        if len(self.batches) % 3 == 0:
            self.failed.append(batch)
            raise RuntimeError("a bad batch")
        return good


def test_a_failing_batch_fails_its_own_requests_and_retries_recover_them(row: FaultCounts) -> None:
    engine, watched = FlakyEngine(), RecordingTransport()
    limits = BatchLimits(batch_tokens=12)
    with (
        serving(engine, batch_limits=limits) as served,
        TeacherClient(served.url, concurrency=64, transport=watched) as client,
    ):
        ask_all(row, 200, 16, asks(client))
    row.refused, row.double = watched.count(500), watched.doubles()
    # Every question failed just as often as it was in a failing batch.
    unlucky = Counter(sequence.tokens for batch in engine.failed for sequence in batch)
    failures = {tuple(json.loads(body)["sequences"][0]): s.count(500) for body, s in watched.statuses.items()}
    assert {tokens: n for tokens, n in failures.items() if n} == dict(unlucky)
    assert row == FaultCounts(row.fault, 200, 200, sum(unlucky.values()))
    assert row.refused > 0


def test_slow_clients_do_not_delay_others(row: FaultCounts) -> None:
    others_are_done, begun, watched = threading.Event(), threading.Semaphore(0), RecordingTransport()
    with (
        serving(FakeEngine(), ConnectionLimits(body_seconds=600, read_seconds=600)) as served,
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
            request = http_request(sequences=[question(i)], prompt_lengths=[1])
            with raw(served) as connection:
                connection.sendall(request[:-30])
                begun.release()
                assert others_are_done.wait(60)
                for byte in request[-30:]:
                    connection.sendall(bytes([byte]))
                ((status, content),) = responses(read_to_end(connection))
            return status == 200 and is_answer(decode_binary(content), i)

        def slow(i: int) -> bool:
            return read_slowly(i) if i % 2 else send_slowly(i)

        slow_ones = FaultCounts("")
        thread = threading.Thread(target=ask_all, args=(slow_ones, 16, 16, slow))
        thread.start()
        for _ in range(16):
            assert begun.acquire(timeout=seconds(60))
        try:
            ask_all(row, 200, 8, asks(client))  # while sixteen are in the middle
        finally:
            others_are_done.set()
            thread.join(60)
    row.double = watched.doubles()
    assert row == FaultCounts(row.fault, 200, 200)
    assert slow_ones == FaultCounts("", 16, 16)
    row.asked, row.right = 216, 216


def test_clients_that_disconnect_free_their_places(row: FaultCounts) -> None:
    engine, watched, places = FakeEngine(), RecordingTransport(), 10
    engine.gate.clear()
    with (
        serving(engine, batch_limits=BatchLimits(max_waiting=places)) as served,
        TeacherClient(served.url, concurrency=64, transport=watched) as client,
    ):
        ask = asks(client)
        with in_background(1, lambda _: ask(100)) as first, opened_at_last(engine):
            assert engine.started.wait(30)  # that one is in the engine and holds it
            leaving = [raw(served) for _ in range(places)]
            for connection in leaving:
                connection.sendall(http_request(sequences=[[999, 999]], prompt_lengths=[1]))
            wait_until(lambda: waiting_requests(served.url) == places)
            for connection in leaving:
                connection.close()
            wait_until(lambda: waiting_requests(served.url) == 0)
            for i in range(places):  # in the middle of their body; a half abort the connection
                with raw(served) as connection:
                    connection.sendall(http_request(sequences=[[999, 999]], prompt_lengths=[1])[:-5])
                    if i % 2:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Every place is free again.
            with in_background(places, lambda i: ask(200 + i)) as futures, opened_at_last(engine):
                wait_until(lambda: waiting_requests(served.url) == places)
                engine.gate.set()
        row.right = sum(future.result() for future in [*first, *futures])
        for _ in range(places):  # in the middle of their answer
            with raw(served, small_window=True) as connection:
                connection.sendall(http_request(sequences=[LONG], prompt_lengths=[1], top_logprobs=1000))
                assert connection.recv(10)
        row.asked = 1 + places
        ask_all(row, 50, 8, ask)
        assert waiting_requests(served.url) == 0
        row.refused = metric(served.url, 'teacher_requests_total{status="499"}')
    assert all(999 not in sequence.tokens for batch, _ in engine.batches for sequence in batch)
    row.double = watched.doubles()
    assert row == FaultCounts(row.fault, 61, 61, row.refused)


def test_a_disconnection_during_the_body_is_no_server_error() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": SCORE_PATH, "query_string": b""}
    asyncio.run(create_app(FakeEngine())({**scope, "headers": [(b"content-length", b"9")]}, receive, send))


def test_a_client_that_never_completes_its_body_gets_504(row: FaultCounts) -> None:
    with serving(FakeEngine(), limits=ServerLimits(request_seconds=0.3)) as served:

        def ask(i: int) -> bool:
            with raw(served) as connection:
                connection.sendall(http_request(sequences=[question(i)], prompt_lengths=[1])[:-5])
                return [status for status, _ in responses(read_to_end(connection))] == [504]

        ask_all(row, 20, 20, ask)
    row.refused, row.right = row.right, 0
    assert row == FaultCounts(row.fault, 20, 0, 20)


def test_requests_refused_by_a_full_queue_are_answered_in_the_end(row: FaultCounts) -> None:
    engine, watched = FakeEngine(), RecordingTransport()
    limits = BatchLimits(max_waiting=4, batch_tokens=12)
    with (
        serving(engine, batch_limits=limits) as served,
        TeacherClient(served.url, concurrency=64, transport=watched) as client,
    ):
        ask_all(row, 100, 40, asks(client))
    row.refused, row.double = watched.count(429), watched.doubles()
    assert row.refused > 0
    assert watched.retry_after == {"1"}
    assert row == FaultCounts(row.fault, 100, 100, row.refused)
