"""The demo, run as a user runs it, on a model small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, DEMO, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def output(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("output")
    done = run_demo("--teacher", tiny_model, "--steps", "2", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


def test_it_leaves_a_plot_and_metrics(output: Path) -> None:
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["held_out_reverse_kl"]) == {"0", "2"}
    assert len(metrics["training_reverse_kl"]) == 2
    assert (output / "reverse_kl.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_student_loads_with_a_third_of_the_layers(output: Path) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2
    assert len(student.get_decoder().layers) == 2


@pytest.mark.parametrize("option", [("--steps", "0"), ("--beta", "1.5"), ("--device", "nowhere")])
def test_a_bad_option_is_named_in_one_line(option: tuple[str, str]) -> None:
    done = run_demo(*option)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"demo.py: error: {option[0]}")
