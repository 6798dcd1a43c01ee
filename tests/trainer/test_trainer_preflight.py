"""Tests of the checks before the first step, and of `fused-distill check`."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fused_distill.cli import main
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer import loop
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.preflight import finding, preflight, server
from fused_distill.trainer.preflight.finding import Finding, show
from fused_distill.trainer.preflight.teacher_of_run import teachers_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving_cases import serving
from trainer_cases import NOT_INTERPRETED, Lab, losses, metrics, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"


def found(config: TrainConfig, timed: bool = False) -> dict[str, Finding]:
    """Return what the checks of a run find, by name."""
    return {finding.name: finding for finding in preflight(Trainer(config), timed)}


def arguments(lab: Lab, tmp_path: Path, *overrides: str) -> list[str]:
    """Return the arguments of the command line for the settings of a lab."""
    lab.config(tmp_path)
    paths = [f"student={lab.student}", f"data.path={lab.data}", f"output={tmp_path}"]
    if not any(override.startswith("teacher.url") for override in overrides):
        paths.append(f"teacher.model={lab.teacher}")
    return [str(tmp_path / "settings.yaml"), *paths, *overrides]


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit status and the output of `fused-distill check`."""
    status = 0
    try:
        main(["check", *arguments])
    except SystemExit as end:
        status = int(str(end.code))
    return status, capsys.readouterr().out


def test_a_sound_run_passes_every_check(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = checked(capsys, *arguments(lab, tmp_path))
    assert status == 0
    rows = [line for line in output.splitlines() if line.startswith(("ok ", "warning ", "error "))]
    for row, start in zip(
        rows,
        (
            "ok       student's LM head: reproduces the model's logits (98 tokens, logit scale 1, ",
            "ok       teacher's loss: ",
            "ok       teacher's LM head: reproduces the model's logits (104 tokens, logit scale 1, ",
            "ok       teacher's chat format: neither model has a chat template; texts end with '<eos>'",
            "ok       time and memory of a step: estimate: about ",
        ),
        strict=True,
    ):
        assert row.startswith(start)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_setting_that_cannot_be_loaded_is_a_cross_and_gives_status_2(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = checked(capsys, *arguments(lab, tmp_path, "student=/nowhere"))
    assert status == 2
    assert output.splitlines()[-1].startswith(
        "error    settings, files and models: student: /nowhere cannot be loaded"
    )


def test_the_checks_change_nothing_in_a_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("data.evaluation_prompts=4", "lmbda=0.5")
    train(lab.config(tmp_path / "with", *overrides))
    monkeypatch.setattr(loop, "preflight", lambda run: preflight(run, timed=True))
    train(lab.config(tmp_path / "timed", *overrides))
    monkeypatch.setattr(loop, "preflight", lambda run: [])
    train(lab.config(tmp_path / "without", *overrides))
    assert losses(tmp_path / "with") == losses(tmp_path / "without") == losses(tmp_path / "timed")
    evaluations = [
        metrics(tmp_path / name, "evaluation")[-1]["loss"] for name in ("with", "without", "timed")
    ]
    assert len({*evaluations}) == 1


def test_a_cross_ends_a_run_before_its_first_step(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "preflight", lambda run: [Finding("error", "a check", "failed")])
    with pytest.raises(ConfigError, match="a check: failed"):
        train(lab.config(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_that_are_not_finite_are_a_cross(lab: Lab, tmp_path: Path) -> None:
    student = shutil.copytree(lab.student, tmp_path / "nan")
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    loss = found(lab.config(tmp_path / "run", f"student={student}"))["teacher's loss"]
    assert loss.level == "error"
    assert loss.text.startswith("the loss is not finite at 4 of 4 tokens; row ")


def test_an_lm_head_that_no_longer_fits_is_a_cross(lab: Lab, tmp_path: Path) -> None:
    run = Trainer(lab.config(tmp_path))

    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    scaled = Scaled(16, 98, bias=False)
    scaled.weight = cast(torch.nn.Linear, run.model.get_output_embeddings()).weight
    run.model.set_output_embeddings(scaled)
    head = preflight(run)[0]
    assert (head.level, head.name) == ("error", "student's LM head")
    assert "its output layer, a Scaled, is no product with its weight" in head.text


@pytest.mark.parametrize("how", ["path", "copy", "lora", "topk"])
def test_a_teacher_with_the_students_weights_gives_a_loss_near_0(lab: Lab, tmp_path: Path, how: str) -> None:
    teacher = shutil.copytree(lab.student, tmp_path / "copy") if how == "copy" else lab.student
    more = {"lora": ["lora.r=2"], "topk": ["teacher.targets=topk", "teacher.k=5"]}.get(how, [])
    config = lab.config(tmp_path / "run", f"teacher.model={teacher}", *more)
    loss = found(config)["teacher's loss"]
    assert loss.level == "warning"
    assert "the teacher has the student's weights, so there is nothing to learn" in loss.text
    assert float(loss.text.split()[0]) == pytest.approx(0, abs=1e-4)


def test_a_loss_above_0_with_the_students_weights_is_a_cross(lab: Lab, tmp_path: Path) -> None:
    run = Trainer(lab.config(tmp_path, f"teacher.model={lab.student}"))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    loss = next(f for f in preflight(run) if f.name == "teacher's loss")
    assert loss.level == "error"
    assert loss.text.endswith("but the teacher has the student's weights, so it should be 0")


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with serving(TransformersEngine.load(str(lab.teacher), "cpu", "float32")) as served:
        yield served.url


def test_replicas_that_agree_pass(
    lab: Lab, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    findings = found(lab.config(tmp_path, f"teacher.url=[{url}, {url}]"))
    assert findings["teacher's answers"] == (
        "ok",
        "teacher's answers",
        "all 2 servers give the same answer twice",
    )
    assert findings["teacher's limits"].text.startswith("the longest sequence fit the server, which takes ")
    assert findings["teacher's LM head"].text.startswith(
        "gives the server's log-probabilities from its hidden states"
    )


def test_a_replica_with_other_weights_is_a_cross(lab: Lab, url: str, tmp_path: Path) -> None:
    topk = ("teacher.targets=topk", "teacher.k=5")
    with serving(TransformersEngine.load(str(lab.student), "cpu", "float32")) as other:
        findings = found(lab.config(tmp_path, f"teacher.url=[{url}, {other.url}]", *topk))
    answers = findings["teacher's answers"]
    assert answers.level == "error"
    assert answers.text.startswith(f"{other.url} has other weights than {url}")


def test_an_absent_replica_is_a_warning(lab: Lab, url: str, tmp_path: Path) -> None:
    topk = ("teacher.targets=topk", "teacher.k=5")
    answers = found(lab.config(tmp_path, f"teacher.url=[{url}, 'http://127.0.0.1:9']", *topk))[
        "teacher's answers"
    ]
    assert answers.level == "warning"
    assert answers.text.startswith("http://127.0.0.1:9 does not answer (no usable answer")
    assert answers.text.endswith("The run uses the others: start it, or remove it from teacher.url")


def test_a_server_that_changes_its_answer_is_not_ok(
    lab: Lab, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(lab.config(tmp_path, f"teacher.url={url}", "teacher.targets=topk", "teacher.k=5"))
    client = server.TeacherClient
    get, calls, noise = client.get_sequence_logprobs, [], [0.0]

    def noisy(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        answer = get(self, *arguments, **options)
        return dataclasses.replace(
            answer, actual_logprobs=answer.actual_logprobs + noise[0] * (len(calls) % 2)
        )

    monkeypatch.setattr(client, "get_sequence_logprobs", noisy)
    for noise[0], level in ((0.0, "ok"), (0.01, "warning"), (1.0, "error")):
        assert getattr(server.same_answers(teachers_of(run)[0]), "level", None) == level


@pytest.mark.parametrize(
    ("student", "teacher", "level", "message"),
    [
        (CHAT, CHAT, "ok", "the chat templates render alike; texts end with '<eos>'"),
        (CHAT, CHAT + "{# the same #}", "ok", "render alike"),
        (
            CHAT,
            CHAT.replace("<|", "[["),
            "warning",
            "teacher.chat_template: own renders its prompts in its own",
        ),
        (CHAT, None, "warning", "the teacher has no chat template, but the student has"),
        (None, CHAT, "warning", "the student has no chat template, but the teacher has"),
        (
            CHAT.replace("<eos>", "<pad>"),
            CHAT.replace("<eos>", "<pad>"),
            "warning",
            "an answer ends with '<pad>' in the student's chat template, but generation stops at '<eos>'",
        ),
    ],
)
def test_chat_formats_are_compared(
    lab: Lab, tmp_path: Path, student: str | None, teacher: str | None, level: str, message: str
) -> None:
    paths: list[Path] = []
    for source, template in ((lab.student, student), (lab.teacher, teacher)):
        paths.append(shutil.copytree(source, tmp_path / source.name))
        if template is not None:
            (paths[-1] / "chat_template.jinja").write_text(template)
    config = lab.config(tmp_path / "run", f"student={paths[0]}", f"teacher.model={paths[1]}")
    chat = found(config)["teacher's chat format"]
    assert chat.level == level
    assert message in chat.text


def test_a_teacher_without_a_tokenizer_is_a_warning(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lab.teacher / name, teacher)
    chat = found(lab.config(tmp_path / "run", f"teacher.model={teacher}"))["teacher's chat format"]
    assert chat.level == "warning"
    assert chat.text.startswith(
        "the teacher has no tokenizer that can be loaded, so the student's is assumed. Set "
    )
    assert "clients" not in caplog.text


def test_other_ends_of_texts_are_a_warning(lab: Lab, tmp_path: Path) -> None:
    teacher = shutil.copytree(lab.teacher, tmp_path / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(teacher)
    chat = found(lab.config(tmp_path / "run", f"teacher.model={teacher}"))["teacher's chat format"]
    assert chat.level == "warning"
    assert "the student's texts end with '<eos>', the teacher's with '<pad>'" in chat.text


def test_time_and_memory_are_estimated(lab: Lab, tmp_path: Path) -> None:
    text = found(lab.config(tmp_path), timed=True)["time and memory of a step"].text
    assert text.startswith("estimate: about ")
    for part in (
        "s per step (update ",
        "rollouts ",
        "student ",
        "optimizer ",
        "teacher ",
        "loss ",
        " GiB (",
    ):
        assert part in text
    untimed = found(lab.config(tmp_path))["time and memory of a step"].text
    assert "per step" not in untimed


def test_a_step_that_does_not_fit_the_memory_is_a_warning(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_distill.trainer.preflight.step_estimate._device_memory", lambda device: 1000)
    memory = found(lab.config(tmp_path))["time and memory of a step"]
    assert memory.level == "warning"
    assert "It does not fit: use lora" in memory.text


def test_the_screen_has_marks_on_a_terminal_and_words_elsewhere() -> None:
    findings = [Finding("ok", "a", "fine"), Finding("warning", "b", "do [this]"), Finding("error", "c", "no")]
    terminal, plain = (Console(file=io.StringIO(), force_terminal=t, width=60) for t in (True, False))
    for console in (terminal, plain):
        show(findings, console)
    coloured = terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(mark in coloured for mark, _ in finding._MARKS.values())
    assert "do [this]" in coloured
    assert plain.file.getvalue().splitlines() == [  # pyright: ignore[reportAttributeAccessIssue]
        "ok       a: fine",
        "warning  b: do [this]",
        "error    c: no",
    ]
