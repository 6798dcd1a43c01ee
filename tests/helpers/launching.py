"""Two processes on the CPU, started by `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from limits import seconds

LAUNCH_OPTIONS = {
    "ddp": ["--multi_gpu"],  # starts several processes on machines without a GPU too
    "fsdp2": ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"],
}
STRATEGIES = tuple(LAUNCH_OPTIONS)


def launch(strategy: str, *script: str) -> subprocess.Popen[str]:
    """Start a script in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    return subprocess.Popen(
        [*command, *options, *LAUNCH_OPTIONS[strategy], *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Without ACCELERATE_USE_CPU each process would train alone on a machine without a GPU.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def wait_for_output(process: subprocess.Popen[str]) -> str:
    """Wait until the processes have ended and return the end of their output."""
    try:
        return process.communicate(timeout=seconds(150))[0][-9000:]
    except subprocess.TimeoutExpired:
        process.terminate()  # accelerate then ends the processes that it started
        pytest.fail(f"does not end: {process.communicate()[0][-9000:]}")
