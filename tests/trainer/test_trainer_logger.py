"""Tests of what a run tells while it runs: the console, metrics of earlier runs, broken lines, trackers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from fused_distill.trainer import console as console_module
from fused_distill.trainer.console import RunConsole
from fused_distill.trainer.logger import MetricsLogger, empty_steps, open_history
from fused_distill.trainer.loop import Trainer, train
from rich.console import Console
from trainer_cases import NOT_INTERPRETED, Lab, metrics
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def step(number: int, tokens: float = 10, **others: float) -> dict[str, Any]:
    row = {"step": number, "kind": "train", "loss": float(number), "tokens": tokens}
    return row | {"tokens_per_second": 5.0, "memory_gib": 1.5, **others}


def test_a_run_prints_a_line_every_log_every_steps_samples_and_a_summary(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(lab.config(tmp_path, "steps=5", "log_every=2", "data.evaluation_prompts=4", "evaluate_every=3"))
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split("  ")[0] for line in lines if line.startswith(("step ", "evaluation at"))]
    assert starts == [
        "evaluation at step 0",
        "step 2/5",
        "step 3/5",  # before the evaluation
        "evaluation at step 3",
        "step 4/5",
        "step 5/5",
        "evaluation at step 5",
    ]
    assert len([line for line in lines if line.startswith("  prompt")]) == 6
    assert len([line for line in lines if line.startswith("  completion")]) == 6
    [before_after] = [line.split() for line in lines if line.startswith("Loss (nats per token)")]
    evaluations = metrics(tmp_path, "evaluation")
    assert before_after[-2:] == [f"{evaluations[i]['loss']:.4g}" for i in (0, -1)]
    assert [line.split()[0] for line in lines[-7:-1]] == [
        "phase", "rollouts", "teacher", "student:", "evaluations", "peak",
    ]  # fmt: skip
    assert lines[-1].endswith("report.html")
    assert not any("\x1b" in line for line in lines)


def test_a_line_has_means_over_tokens_and_both_policies_apart(capsys: pytest.CaptureFixture[str]) -> None:
    on = {"on_policy/loss": 4.0, "on_policy/tokens": 30.0}
    off = {"off_policy/loss": 2.0, "off_policy/tokens": 10.0}
    RunConsole(9, 0).print_steps([step(1, 30, **on) | {"loss": 4.0}, step(2, 10, **off) | {"loss": 2.0}])
    assert capsys.readouterr().out == "step 2/9  loss 3.5 (on-policy 4, off-policy 2)  5 tokens/s\n"


def test_a_terminal_gets_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(console_module, "Console", lambda **_: terminal)
    console = RunConsole(8, 2)
    console.advance(step(4))
    console.close()
    shown = screen.getvalue()
    assert "4/8" in shown
    assert "loss 4  5 tokens/s  time left" in shown


def test_samples_are_printed_on_a_line_each_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(console_module, "Console", lambda **options: Console(file=screen, **options))
    sample = {"prompt": "a\n\x1b[31m[red]" + "p" * 300, "completion": "é\n" + "c" * 500}
    RunConsole(8, 0).print_evaluation(step(1) | {"samples": [sample] * 3})
    screen.seek(0)
    lines = screen.read().splitlines()
    assert len(lines) == 5
    assert lines[1] == f"  prompt      ...'{'p' * 200}'"
    assert lines[2] == f"  completion  '?\\n{'c' * 398}'..."


def test_only_the_main_process_prints_and_writes(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other:
        is_main_process = False

    logger = MetricsLogger(Other(), lab.config(tmp_path), 0)  # pyright: ignore[reportArgumentType]
    logger.log(1, "train", {"loss": 1.0, "tokens": 1.0})
    logger.write_report()
    logger.finish()
    logger.close()
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_metrics_of_an_earlier_run_are_kept_and_named(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    for number in (1, 2):
        (output / "metrics.jsonl").write_text(f"run {number}\n")
        (output / "report.html").write_text(f"page {number}")
        rows, [notice] = open_history(output / "metrics.jsonl", 0)
        assert rows == []
        kept = f"metrics.jsonl as metrics-{number}.jsonl, report.html as report-{number}.html"
        assert notice == f"{output} holds an earlier run, whose files are kept: {kept}"
        assert (output / f"metrics-{number}.jsonl").read_text() == f"run {number}\n"
        assert (output / f"report-{number}.html").read_text() == f"page {number}"
    assert (output / "metrics-1.jsonl").read_text() == "run 1\n"

    (output / "metrics.jsonl").write_text("run 3\n")
    train(lab.config(output, "steps=1"))
    assert "metrics.jsonl as metrics-3.jsonl" in capsys.readouterr().out
    assert len(metrics(output)) == 1


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(step(i)) + "\n" for i in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "ki')
    assert open_history(path, 3) == ([step(1), step(2), step(3)], [])
    assert path.read_text() == "".join(lines[:3])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "broken", ['{"step": 2,', "[1, 2]", '{"loss": 1.0}', '{"step": "2", "kind": "train"}', ""]
)
def test_a_broken_line_on_resume_is_named_with_what_is_kept(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = "".join(f"{line}\n" for line in (json.dumps(step(1)), broken, json.dumps(step(3))))
    path.write_text(content)
    rows, [notice] = open_history(path, 3)
    assert rows == [step(1), step(3)]
    assert notice == (
        f"{path}: line 2 is not a line of metrics: {broken!r}; it keeps 2 sound lines up to step 3; "
        "metrics-1.jsonl is the file as it was"
    )
    assert (tmp_path / "metrics-1.jsonl").read_text() == content
    assert len(path.read_text().splitlines()) == 2


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\x00\xfe\n" + json.dumps(step(1)).encode() + b"\n")
    rows, [notice] = open_history(path, 3)
    assert rows == [step(1)]
    assert "line 1 is not a line of metrics" in notice


def test_a_run_whose_completions_are_all_empty_says_so_loudly(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_buffer = Trainer.fill_buffer

    def without_completions(self: Trainer) -> Any:
        return [[sample._replace(completion=[]) for sample in part] for part in fill_buffer(self)]

    monkeypatch.setattr(Trainer, "fill_buffer", without_completions)
    train(lab.config(tmp_path, "lmbda=0"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert [warning.split(",")[0] for warning in warnings] == [
        "WARNING: in all 1 steps every completion was empty",
        "WARNING: in all 3 steps every completion was empty",
        "WARNING: in all 3 steps every completion was empty",
    ]
    assert "in all 3 steps every completion was empty" in (tmp_path / "report.html").read_text()


def test_steps_with_some_tokens_give_no_warning() -> None:
    assert empty_steps([step(1), step(2)]) == []
    [warning] = empty_steps([step(1), step(2, 0), step(3, 0)])
    assert warning.startswith("in 2 of 3 steps")
    assert "the first was step 2" in warning


def test_trackers_get_a_key_per_setting_and_the_name_of_the_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    calls: list[Any] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args, **kw: calls.append((args, kw)))
    config = lab.config(
        tmp_path / "name", "teacher={targets: topk, k: 7}", f"teacher.model={lab.teacher}", "lora={r: 3}"
    )
    config = config.model_copy(update={"trackers": ["tensorboard", "wandb", "trackio"]})
    MetricsLogger(Accelerator(), config, 0).close()
    [((project, settings), options)] = calls
    assert project == "fused-distill"
    assert settings["teacher.k"] == 7
    assert settings["lora.r"] == 3
    assert settings["student"] == str(lab.student)
    assert settings["frozen"] == "[]"
    assert {type(value) for value in settings.values()} <= {str, int, float, bool}
    assert options == {"init_kwargs": {"wandb": {"name": "name"}, "trackio": {"name": "name"}}}
