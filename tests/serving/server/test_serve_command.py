"""`fused-distill serve-teacher`, run as a user runs it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fused_distill.cli import main
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.server import start
from limits import seconds
from servers import Server, running
from serving_cases import process_ended, wait_until

COMMAND = [sys.executable, "-m", "fused_distill.cli", "serve-teacher"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture
def server(tiny_model: Path, log: Path) -> Iterator[Server]:
    with running([*COMMAND, str(tiny_model)], log, FUSED_DISTILL_TOKEN="secret") as started:
        yield started


def test_the_command_serves_a_local_model_and_ends_on_sigterm(
    server: Server, log: Path, tiny_model: Path
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
        assert process.wait(30) == 0
    assert results[0].logprobs.shape == (800, 5)
    lines = log.read_text()
    for part in (f"{tiny_model}, float32 on cpu", "FUSED_DISTILL_TOKEN", f"{url}\n", "300 s per request"):
        assert lines.count(part) == 1, part  # one summary
    assert "POST" not in lines  # no access log


def test_ctrl_c_ends_a_server_with_status_130(server: Server, log: Path) -> None:
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(seconds(60)) == 130
    assert "Traceback" not in log.read_text()


def test_a_second_ctrl_c_does_not_wait_for_requests(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running([*COMMAND, str(tiny_model), "--access-log"], log) as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half_sent:
            half_sent.sendall(
                b"POST /get_sequence_logprobs/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
            )
            httpx.get(f"{url}/health")
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)  # it waits for the rest of the body
            process.send_signal(signal.SIGINT)
            assert process.wait(seconds(60)) == 130
    text = log.read_text()
    assert "Traceback" not in text
    assert "GET /health" in text  # the access log that was asked for


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let SIGHUP end processes, though these tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_the_end_of_a_terminals_session_leaves_no_lm_head_behind(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    with running([*COMMAND, str(tiny_model)], tmp_path / "log", TMPDIR=str(folder)) as (process, url):
        assert httpx.get(f"{url}/v1/teacher/head").status_code == 200
        assert list(folder.glob("fused-distill-head-*"))
        process.send_signal(signal.SIGHUP)
        assert process.wait(seconds(60)) == 0
    assert not list(folder.glob("fused-distill-head-*"))


@pytest.mark.usefixtures("hangup")
def test_a_server_under_nohup_outlives_the_session() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    start.end_on_hangup()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_ctrl_c_while_the_model_loads_ends_the_command_quietly(tiny_model: Path, tmp_path: Path) -> None:
    script = (
        "import time; from fused_distill.serving.server.transformers_engine import TransformersEngine;"
        "TransformersEngine.load = lambda *_: (print('loading', flush=True), time.sleep(1000));"
        f"from fused_distill.cli import main; main(['serve-teacher', {str(tiny_model)!r}, '--port', '0'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(seconds(60)) == 130
        assert process.stderr.read() == b""


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that ends with status 2 before it loads a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FUSED_DISTILL_TOKEN", raising=False)
        patch.setattr(start, "create_app", None)
        with pytest.raises(SystemExit) as refused:
            main(["serve-teacher", *arguments])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port: must be an integer between 0 and 65535, got '99999'"),
        (["--port", "http"], "--port: must be an integer"),
        (["--host", "no.such.host.invalid"], "cannot bind no.such.host.invalid port 8000"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--device", "tpu"], "--device must be auto or a device such as cpu or cuda:1, got 'tpu'"),
        (["--device", "meta"], "--device meta is not available"),
        (["--engine-options", "{"], "--engine-options: must be a JSON object, got '{'"),
        (["--engine-options", "[1]"], "--engine-options: must be a JSON object"),
        (["--engine-options", '{"a": 1}'], "--engine-options must not be given with --engine transformers"),
        (["--max-length", "-5"], "--max-length: must be an integer at least 1, got '-5'"),
        (["--max-length", "131073"], "max_length must be at most the model's 131072 positions, got 131073"),
        (["--request-seconds", "inf"], "--request-seconds: must be a positive number of seconds, got 'inf'"),
        (["--batch-tokens", "0"], "--batch-tokens: must be an integer at least 1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_model_is_loaded(
    options: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = [] if "--port" in options or "--host" in options else ["--port", "0"]
    assert message in refusal(capsys, str(tiny_model), *port, *options)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = refusal(capsys, "/no/such/folder", "--port", str(port))
    assert f"cannot bind 127.0.0.1 port {port}: Address already in use" in error


def test_the_port_of_a_server_that_still_loads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with start.bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        error = refusal(capsys, "/no/such/folder", "--port", str(port))
    assert f"cannot bind 127.0.0.1 port {port}: Address already in use" in error


@pytest.mark.parametrize("change", [{"vocab_size": "x"}, {"dtype": "nonesuch"}])
def test_a_config_that_cannot_be_read_is_one_line(
    change: dict[str, str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**json.loads((tiny_model / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(capsys, str(tmp_path), "--port", "0")
    assert f"the files of {tmp_path} cannot be read" in error


def test_a_missing_folder_is_called_missing(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "/no/such/folder", "--port", "0")
    assert "the folder /no/such/folder does not exist" in error


def test_an_address_that_others_can_reach_needs_a_token(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_model), "--port", "0", "--host", "0.0.0.0"]
    assert "FUSED_DISTILL_TOKEN must be set to serve on 0.0.0.0" in refusal(capsys, *arguments)
    # Allowed, it fails at the next check only.
    error = refusal(capsys, *arguments, "--allow-no-token", "--device", "cuda:99")
    assert "cuda:99 is not available" in error


CHILD = """
import multiprocessing, os, sys, time
from fused_distill import cli  # as the command does
from fused_distill.child_processes import end_children_with_this_process

def work():
    print(os.getpid(), flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    end_children_with_this_process()
    multiprocessing.get_context(sys.argv[1]).Process(target=work).start()
    time.sleep(1000)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_the_server_end_with_it(tmp_path: Path, method: str) -> None:
    script = tmp_path / "server.py"
    script.write_text(CHILD)
    with subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: process_ended(child), seconds(60))
        process.stdout.close()


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["teach"])
    assert refused.value.code == 2
    assert "serve-teacher" in capsys.readouterr().err
