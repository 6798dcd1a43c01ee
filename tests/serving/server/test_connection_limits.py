"""Idle and stalled connections, bodies in flight, foreign hosts, and shutdown."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, suppress

import httpx
import pytest
from fault_cases import http_request, raw, read_to_end, responses
from fused_distill.serving.protocol.request import SCORE_PATH
from fused_distill.serving.server.app import create_app
from fused_distill.serving.server.connections import ConnectionLimits
from fused_distill.serving.server.validation import ServerLimits
from limits import seconds
from serving_cases import VALID_BODY, FakeEngine, Served, post, serving, wait_until

REQUEST = http_request(**VALID_BODY)
UNFINISHED = {
    "no byte": b"",
    "headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "body": REQUEST[:-5],
    "rest of a refused body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1",
}


@pytest.mark.parametrize("beginning", UNFINISHED.values(), ids=UNFINISHED)
def test_a_connection_that_never_completes_a_request_is_closed(beginning: bytes) -> None:
    limits = ConnectionLimits(header_seconds=0.1, body_seconds=0.1)
    with serving(FakeEngine(), limits) as served, raw(served) as connection:
        connection.sendall(beginning)
        try:
            stream = read_to_end(connection)  # raises socket.timeout if it stays open
        except ConnectionResetError:
            return
        assert all(status == 404 for status, _ in responses(stream))


def test_single_bytes_do_not_prolong_the_time_for_headers() -> None:
    with serving(FakeEngine(), ConnectionLimits(header_seconds=0.2)) as served, raw(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        closed = threading.Event()

        def drip() -> None:
            while not closed.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with suppress(ConnectionResetError):
                assert not read_to_end(connection)  # raises TimeoutError if it stays open
        finally:
            closed.set()
            thread.join()


@pytest.mark.parametrize("beginning", UNFINISHED.values(), ids=UNFINISHED)
def test_connections_that_wait_make_room_for_others(beginning: bytes) -> None:
    limits = ConnectionLimits(connections=8, header_seconds=600, body_seconds=600)
    with serving(FakeEngine(), limits) as served, ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(raw(served)).sendall(beginning)
        assert httpx.get(f"{served.url}/health", timeout=seconds(60)).status_code == 200
        assert len(served.server.server_state.connections) <= 9


def test_a_client_that_does_not_read_its_answer_is_disconnected() -> None:
    with (
        serving(FakeEngine(), ConnectionLimits(read_seconds=0.2)) as served,
        raw(served, small_window=True) as connection,
    ):
        connection.sendall(http_request(sequences=[[5] * 1000], prompt_lengths=[1], top_logprobs=1000))
        assert connection.recv(1)
        wait_until(lambda: not served.server.server_state.connections)


def test_bodies_in_flight_are_bounded_together() -> None:
    limits = ServerLimits(bodies_bytes=len(REQUEST.partition(b"\r\n\r\n")[2]))
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, limits=limits) as served, raw(served) as first:
        first.sendall(REQUEST)
        assert engine.started.wait(seconds(60))
        refused = post(served.url, **VALID_BODY, response_format="base64")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "bodies" in refused.json()["detail"]
        engine.gate.set()
        assert [status for status, _ in responses(read_to_end(first))] == [200]
        assert post(served.url, **VALID_BODY).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("gpu-box:8000", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("localhost@evil.example", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_without_a_token_foreign_hosts_are_refused(host: str, status: int) -> None:
    with serving(FakeEngine(), hosts=["gpu-box"]) as served:
        for path in ("/v1/teacher", "/health"):
            assert httpx.get(served.url + path, headers={"Host": host}).status_code == status
        assert (
            httpx.post(served.url + SCORE_PATH, json=VALID_BODY, headers={"Host": host}).status_code == status
        )


def test_with_a_token_any_host_is_answered() -> None:
    headers = {"Host": "teacher.example", "Authorization": "Bearer secret"}
    with serving(FakeEngine(), token="secret") as served:
        assert httpx.get(f"{served.url}/v1/teacher", headers=headers).status_code == 200


def test_shutdown_does_not_wait_for_a_body_that_never_comes() -> None:
    limits = ConnectionLimits(body_seconds=600, stopping_seconds=0.1)
    served = Served(create_app(FakeEngine()), limits)
    with raw(served) as connection:
        connection.sendall(REQUEST[:-5])
        wait_until(lambda: len(served.server.server_state.tasks) == 1)
        served.server.should_exit = True
        served.thread.join(seconds(60))  # far below the 300 s that a request may take
        assert not served.thread.is_alive()
