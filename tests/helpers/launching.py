"""Two processes on the CPU, started as a user of accelerate starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from limits import seconds

LAUNCHED = {
    "ddp": ["--multi_gpu"],  # which starts processes where there is no GPU too
    "fsdp2": ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"],
}


def launched(how: str, *script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    fixed = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    return subprocess.Popen(
        [*command, *fixed, *LAUNCHED[how], *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def said(process: subprocess.Popen[str]) -> str:
    """The end of what it said, once it has ended."""
    try:
        return process.communicate(timeout=seconds(150))[0][-9000:]
    except subprocess.TimeoutExpired:
        process.terminate()  # accelerate then ends its own
        pytest.fail(f"does not end: {process.communicate()[0][-9000:]}")
