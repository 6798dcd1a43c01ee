"""Server processes for the benchmarks and the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

START_SECONDS = 300


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str


@contextmanager
def running(
    command: list[str], log: Path, port: int | None = None, /, **environment: str
) -> Iterator[Server]:
    """Run a server on 127.0.0.1, yield when /health answers, and end it afterwards.

    The port is an unused one unless it is given. `--port PORT` is appended to the command.
    """
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=settings, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        server, until = Server(process, f"http://127.0.0.1:{port}"), time.monotonic() + START_SECONDS
        while not _healthy(server.url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
