"""`fused-distill serve-teacher`, run as a user runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cases import INTERPRETED
from fused_distill.cli import main
from fused_distill.serving.client import TeacherClient

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


@pytest.fixture
def server(tiny_model: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "fused_distill.cli",
        "serve-teacher",
        str(tiny_model),
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FUSED_DISTILL_TOKEN": "secret"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.TransportError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
    yield process, url
    process.kill()
    process.wait()


def test_the_command_serves_a_local_model_and_ends_on_sigterm(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, url = server
    with TeacherClient(url, token="secret") as client:
        info = client.info()
        assert len(info["tokenizer_fingerprint"]) == 64
        sequences = [[3, 4, 5, 6, 7]] * 200
        results = []
        asking = threading.Thread(
            target=lambda: results.append(client.get_sequence_logprobs(sequences, [1] * 200, top_logprobs=5))
        )
        asking.start()
        asking.join(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert results[0].logprobs.shape == (800, 5)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["teach"])
    assert refused.value.code == 2
    assert "serve-teacher" in capsys.readouterr().err
