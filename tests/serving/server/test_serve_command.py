"""`fused-distill serve-teacher`, run as a user runs it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fused_distill.cli import main
from fused_distill.serving.client.client import TeacherClient
from servers import Server, running


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "fused_distill.cli", "serve-teacher", str(tiny_model)]
    with running(command, tmp_path / "log", FUSED_DISTILL_TOKEN="secret") as started:
        yield started


def test_the_command_serves_a_local_model_and_ends_on_sigterm(server: Server) -> None:
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
        assert process.wait(30) == 0
    assert results[0].logprobs.shape == (800, 5)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["teach"])
    assert refused.value.code == 2
    assert "serve-teacher" in capsys.readouterr().err
