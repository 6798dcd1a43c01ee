"""Calls that are given up: by close, by Ctrl-C, during a request and between two."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import ServerError
from limits import seconds
from raw_server import RawServer, Received, http_response, stuck
from serving_cases import client_of_responses, in_background, one_position, wait_until

CALLS: dict[str, Callable[[TeacherClient, Path], Any]] = {
    "get_sequence_logprobs": lambda client, _: client.get_sequence_logprobs([[1, 2], [3, 4]], [1, 1]),
    "get_hidden_states": lambda client, _: client.get_hidden_states([[1, 2], [3, 4]], [1, 1]),
    "head": lambda client, folder: client.head(folder),
}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which it does not in a worker of pytest-xdist."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def interrupt_when(condition: Callable[[], bool], interrupt: Callable[[], None] = press_ctrl_c) -> None:
    """Press Ctrl-C when the condition is true."""

    def wait() -> None:
        wait_until(condition, 60)
        interrupt()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("name", CALLS)
def test_closing_ends_a_call_on_a_stuck_server(name: str, tmp_path: Path) -> None:
    with RawServer(stuck) as server:
        client = TeacherClient(server.url)
        with in_background(1, lambda _: CALLS[name](client, tmp_path)) as futures:
            wait_until(lambda: bool(server.received), 60)
            client.close()
            with pytest.raises(ServerError, match="closed"):
                futures[0].result(seconds(60))


@pytest.mark.parametrize("name", ["info", "wait_until_ready"])
def test_closing_ends_a_call_on_a_server_that_does_not_describe_itself(name: str) -> None:
    with RawServer(stuck, describes=False) as server:
        client = TeacherClient(server.url)
        with in_background(1, lambda _: getattr(client, name)()) as futures:
            wait_until(lambda: bool(server.received), 60)
            client.close()
            with pytest.raises(ServerError, match="closed"):
                futures[0].result(seconds(60))


def test_closing_ends_a_call_whose_transport_cannot_be_woken() -> None:
    entered, forever = threading.Event(), threading.Event()

    def handle(_: httpx.Request) -> httpx.Response:
        entered.set()
        forever.wait()
        raise httpx.ConnectError("too late")

    client = TeacherClient("http://teacher", transport=httpx.MockTransport(handle))
    with in_background(1, lambda _: client.get_sequence_logprobs([[1, 2]], [1])) as futures:
        assert entered.wait(seconds(60))
        client.close()
        with pytest.raises(ServerError, match="closed"):
            futures[0].result(seconds(60))
    forever.set()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_ends_a_call_on_a_stuck_server_and_its_connections(name: str, tmp_path: Path) -> None:
    left = threading.Event()

    def handle(request: Received) -> bytes:
        stuck(request)
        left.set()
        return b""

    with RawServer(handle) as server, TeacherClient(server.url) as client:
        interrupt_when(lambda: bool(server.received))
        with pytest.raises(KeyboardInterrupt):
            CALLS[name](client, tmp_path)
        assert left.wait(seconds(60))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_rollouts_on_a_stuck_server() -> None:
    with RawServer(stuck) as server, VllmRollouts(server.url, model="m") as rollouts:
        interrupt_when(lambda: len(server.received) == 3)
        with pytest.raises(KeyboardInterrupt):
            rollouts.generate([[1], [2], [3]], Sampling(seed=0))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_wait_between_two_attempts() -> None:
    client, requests = client_of_responses(httpx.Response(503, headers={"Retry-After": "600"}))
    interrupt_when(lambda: bool(requests))
    with pytest.raises(KeyboardInterrupt):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(requests) == 1


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_just_before_a_wait_begins_ends_it() -> None:
    client, requests = client_of_responses(httpx.Response(503, headers={"Retry-After": "60"}))
    # Unlike a signal, this does not wake a thread that waits, just as a signal does not that comes too early.
    interrupt_when(lambda: bool(requests), interrupt=_thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(requests) == 1


@pytest.mark.usefixtures("interruptible")
def test_a_client_goes_on_after_ctrl_c_and_so_do_its_other_threads() -> None:
    released = threading.Event()

    def handle(request: Received) -> bytes:
        if not released.is_set():
            return stuck(request)
        return http_response(one_position().content)

    with RawServer(handle) as server, TeacherClient(server.url, concurrency=2) as client:

        def ask(_: int) -> Any:
            return client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist()

        def both_are_stuck() -> bool:
            if len(server.received) < 2:
                return False
            released.set()
            return True

        with in_background(1, ask) as other:
            interrupt_when(both_are_stuck)
            with pytest.raises(KeyboardInterrupt):
                ask(0)
            assert other[0].result(seconds(60)) == [-2]
        assert ask(0) == [-2]


def test_after_an_error_the_other_requests_of_a_call_are_not_tried_again() -> None:
    seen: list[bytes] = []
    second = threading.Event()

    def handle(request: Received) -> bytes:
        seen.append(request.body)
        if b"[7" in request.body:  # refused once the other has been asked
            assert second.wait(60)
            return http_response(b"{}", "422 Unprocessable Entity")
        second.set()
        return http_response(b"", "503 Service Unavailable", Retry_After="1")

    with RawServer(handle) as server, TeacherClient(server.url, request_tokens=1) as client:
        with pytest.raises(ServerError, match="422"):
            client.get_sequence_logprobs([[7, 8], [1, 2]], [1, 1])
        wait_until(lambda: not any(t.name == "fused-distill-client" for t in threading.enumerate()), 60)
    assert len(seen) == 2


def test_a_closed_client_says_so() -> None:
    client, requests = client_of_responses(one_position())
    client.close()
    client.close()
    for call in (client.info, client.wait_until_ready, lambda: client.get_sequence_logprobs([[1, 2]], [1])):
        with pytest.raises(ServerError, match="closed"):
            call()
    assert not requests


def test_closing_a_client_that_was_never_used_is_allowed() -> None:
    TeacherClient("http://teacher").close()
