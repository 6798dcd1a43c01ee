"""Tests of examples/demo.py, run as a command on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("demo")  # run once
DEMO = Path(__file__).parents[2] / "examples/demo.py"


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, DEMO, *arguments], capture_output=True, text=True, env=environment, check=False
    )


class Demo(NamedTuple):
    """A finished run of the demo."""

    output: Path
    printed: str


@pytest.fixture(scope="module")
def demo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    path, printed = tmp_path_factory.mktemp("output"), ""
    paths = [f"output={path}", f"student={path}/start", f"data.path={path}/texts.jsonl"]
    paths.append(f"teacher.model={path}/teacher")
    for _ in range(2):  # the second run starts from the beginning
        done = run_demo("--teacher", tiny_model, "steps=2", "rollouts.max_completion_length=8", *paths)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return Demo(path, printed)


@pytest.fixture(scope="module")
def output(demo: Demo) -> Path:
    return demo.output


def test_completions_before_and_after_the_training_are_shown(demo: Demo) -> None:
    shown = demo.printed.partition("Sampled at temperature")[2]
    first_cells = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") > 2]
    assert [cell for cell in first_cells if cell] == ["before", "after", "teacher"] * 3


def test_the_demo_writes_metrics_and_a_report(output: Path) -> None:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("evaluation", 0),
        ("train", 1),
        ("train", 2),
        ("evaluation", 2),
    ]
    assert "<svg" in (output / "report.html").read_text()
    assert (output / "metrics-1.jsonl").exists()  # of the first run


def test_the_saved_student_lacks_the_middle_layers(output: Path) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 4
    assert len(student.get_decoder().layers) == 4


def test_held_out_prompts_are_not_trained_on(output: Path) -> None:
    rows = [json.loads(line)["prompt"] for line in (output / "texts.jsonl").read_text().splitlines()]
    assert not set(rows[:-16]) & set(rows[-16:])
    assert len(set(rows)) == 80


def test_an_invalid_setting_is_named_in_one_line() -> None:
    done = run_demo("steps=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("demo.py: error: steps: ")
