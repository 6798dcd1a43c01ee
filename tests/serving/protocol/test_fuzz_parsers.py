"""A short, repeatable run of the fuzzer `fuzz_parsers.py`; `make fuzz` runs it longer."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from limits import seconds

pytestmark = pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris is not installed: it has wheels for Linux on x86-64 only"
)


def test_the_fuzzer_finds_no_input_that_is_mishandled(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_parsers.py"))]
    command += ["-runs=20000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds(300))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Done 20000 runs" in run.stderr
