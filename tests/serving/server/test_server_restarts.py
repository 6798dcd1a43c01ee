"""A server process that is killed, restarted and terminated amid requests."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fault_cases import (
    FaultCounts,
    RecordingTransport,
    ask_all,
)
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary
from fused_distill.serving.protocol.request import SCORE_PATH
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.serving.server.validation import ServerLimits, parse_request
from limits import seconds
from serving_cases import (
    wait_until,
    waiting_requests,
)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def command(model: Path, port: int, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`fused-distill serve-teacher` as a process that is ready to answer."""
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
def scored_sequences(tiny_model: Path) -> list[tuple[list[int], TeacherLogprobs]]:
    """Return sequences and the engine's answer to each of them alone."""
    engine = TransformersEngine.load(str(tiny_model), "cpu", "float32")
    generator = random.Random(3)
    pairs: list[tuple[list[int], TeacherLogprobs]] = []
    for _ in range(400):
        tokens = [generator.randrange(3, 90) for _ in range(generator.randint(3, 20))]
        sequences, options = parse_request(
            json.dumps({"sequences": [tokens], "prompt_lengths": [1], "top_logprobs": 5}).encode(),
            engine,
            ServerLimits(),
        )[1:]
        (answer,) = engine.score(sequences, options)
        assert isinstance(answer, TeacherLogprobs)
        pairs.append((tokens, answer))
    return pairs


def is_close(got: TeacherLogprobs, want: TeacherLogprobs) -> bool:
    if got.lengths.tolist() != want.lengths.tolist():
        return False
    return all(
        np.allclose(a, b, atol=2e-5)
        for a, b in ((got.actual_logprobs, want.actual_logprobs), (got.logprobs, want.logprobs))
    )


def test_a_killed_and_restarted_server_loses_and_doubles_nothing(
    tiny_model: Path, scored_sequences: list[tuple[list[int], TeacherLogprobs]], row: FaultCounts
) -> None:
    watched, port = RecordingTransport(), unused_port()
    asking = threading.Thread()
    with TeacherClient(
        f"http://127.0.0.1:{port}",
        concurrency=16,
        transport=watched,
        protocol="fused-distill",
    ) as client:

        def ask(i: int) -> bool:
            tokens, want = scored_sequences[i]
            return is_close(client.get_sequence_logprobs([tokens], [1], top_logprobs=5), want)

        with command(tiny_model, port) as (process, _):
            asking = threading.Thread(target=ask_all, args=(row, len(scored_sequences), 16, ask))
            asking.start()
            wait_until(lambda: watched.count(200) >= 80, 60)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        before = watched.count(200)
        with command(tiny_model, port):
            asking.join(120)
            assert not asking.is_alive()
    row.double, row.refused, row.broken = watched.doubles(), watched.unreachable, watched.broken
    assert before < len(scored_sequences)  # it was in the middle
    assert row.broken >= 1
    assert row == FaultCounts(row.fault, 400, 400, row.refused, 0, 0, row.broken)


def test_sigterm_answers_pending_requests_and_refuses_new_ones(
    tiny_model: Path, scored_sequences: list[tuple[list[int], TeacherLogprobs]], row: FaultCounts
) -> None:
    count, size, port = 20, 40, unused_port()
    with (
        command(tiny_model, port, "--batch-tokens", "1") as (process, url),
        httpx.Client(timeout=seconds(60)) as http,
    ):

        def ask(i: int) -> bool:
            batch = scored_sequences[i * 20 : i * 20 + size]
            body = {"sequences": [t for t, _ in batch], "prompt_lengths": [1] * len(batch), "top_logprobs": 5}
            response = http.post(url + SCORE_PATH, json={**body, "response_format": "binary"})
            return is_close(
                decode_binary(response.content), TeacherLogprobs.join([answer for _, answer in batch])
            )

        asking = threading.Thread(target=ask_all, args=(row, count, count, ask))
        asking.start()
        wait_until(lambda: waiting_requests(url) >= count - 1)
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
    assert row == FaultCounts(row.fault, count, count, 1)


def test_a_terminated_server_exits_with_status_0(tiny_model: Path) -> None:
    with command(tiny_model, unused_port()) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_connections_of_a_server_that_has_stopped_do_not_hold_its_port(tiny_model: Path) -> None:
    port = unused_port()
    with command(tiny_model, port) as (process, url), httpx.Client() as http:
        http.get(f"{url}/health")  # the server closes this connection, which then waits for stray packets
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with command(tiny_model, port) as (process, _):
        assert process.poll() is None
