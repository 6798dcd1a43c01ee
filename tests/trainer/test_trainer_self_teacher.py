"""Tests of a teacher that is the student: as it was, copied every few steps, or its average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.header import header
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.preflight import preflight
from fused_distill.trainer.teachers import load_teachers
from plain_loop import assert_equals_plain_steps
from trainer_cases import NOT_INTERPRETED, Lab, assert_same_run, transformers
from trainer_cases import lab as lab
from trainer_cases import prompts as prompts

pytestmark = NOT_INTERPRETED
KINDS = pytest.mark.parametrize("how", ["refresh_every: 2", "ema: 0.75"])


def run(lab: Lab, prompts: Path, output: Path, teacher: str, *overrides: str) -> Trainer:
    """Return a run with prompts of its own for the teacher."""
    source = f"teacher={{model: self{teacher and ', '}{teacher}}}"
    return Trainer(lab.config(output, f"data.path={prompts}", source, *overrides))


def parameters(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def students(trainer: Trainer, steps: int) -> list[list[torch.Tensor]]:
    """Train, and return the student's parameters at the start and after every step."""
    states = [parameters(trainer.model)]
    for trainer.step in range(steps):
        trainer.update(trainer.fill_buffer())
        states.append(parameters(trainer.model))
    return states


def teacher_of(trainer: Trainer) -> list[torch.Tensor]:
    teacher: Any = trainer.teachers[""]
    return parameters(teacher.model)


@pytest.mark.parametrize("lora", [(), ("lora.r=2", "gradient_checkpointing=true")], ids=["", "lora"])
@pytest.mark.parametrize(("how", "copied"), [("", 0), ("refresh_every: 2", 2)])
def test_the_teacher_is_the_student_at_the_start_or_at_the_last_copy(
    lab: Lab, prompts: Path, tmp_path: Path, how: str, copied: int, lora: tuple[str, ...]
) -> None:
    trainer = run(lab, prompts, tmp_path, how, *lora)
    states = students(trainer, 3)
    torch.testing.assert_close(teacher_of(trainer), states[copied], rtol=0, atol=0)
    assert any((a != b).any() for a, b in zip(states[2], states[3], strict=True))


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["", "lora"])
def test_the_teacher_is_the_moving_average_of_the_student(
    lab: Lab, prompts: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    trainer = run(lab, prompts, tmp_path, "ema: 0.75", *lora)
    first, *states = students(trainer, 3)
    average = first
    for state in states:
        average = [0.75 * old + 0.25 * new for old, new in zip(average, state, strict=True)]
    torch.testing.assert_close(teacher_of(trainer), average)


def test_steps_with_hints_for_the_student_as_teacher_equal_a_plain_pytorch_loop(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    trainer = run(lab, prompts, tmp_path, "", "beta=0.5", "lmbda=0", "steps=5", "learning_rate=0.001")
    assert_equals_plain_steps(trainer, 0.5, 5)


@KINDS
def test_a_resumed_run_has_the_teacher_that_it_had(lab: Lab, prompts: Path, tmp_path: Path, how: str) -> None:
    settings = (f"data.path={prompts}", f"teacher={{model: self, {how}}}")
    train(lab.config(tmp_path / "at_once", *settings, "steps=5"))
    train(lab.config(tmp_path / "parts", *settings, "steps=3"))
    train(lab.config(tmp_path / "parts", *settings, "steps=5"), resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "at_once")


def test_a_resumed_run_does_not_follow_the_student_in_another_way(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    train(lab.config(tmp_path, f"data.path={prompts}", "teacher={model: self, ema: 0.75}", "steps=1"))
    changed = lab.config(tmp_path, f"data.path={prompts}", "teacher={model: self, ema: 0.5}", "steps=2")
    with pytest.raises(ConfigError, match=r"^teacher\.ema: was 0\.75 before, is 0\.5"):
        train(changed, resume=True)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("model: self, refresh_every: 2, ema: 0.5", "must have at most one of refresh_every and ema"),
        ("model: x, ema: 0.5", "ema must be null unless model is self, got 0.5"),
        ("url: 'http://x', refresh_every: 2", "refresh_every must be null unless model is self, got 2"),
        ("model: self, ema: 1", "less than 1"),
        ("model: self, tokenizer: x", "tokenizer must not be set with model self, got x"),
        ("model: self, chat_template: own", "chat_template must not be set with model self, got own"),
        ("model: self, dtype: bfloat16", "dtype must not be set with model self, got bfloat16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    lab: Lab, tmp_path: Path, teacher: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.config(tmp_path, "teacher.model=null", f"teacher={{{teacher}}}")


@KINDS
def test_a_teacher_that_follows_the_student_has_no_store_and_no_shards(
    lab: Lab, tmp_path: Path, how: str
) -> None:
    config = lab.config(tmp_path, f"teacher={{model: self, targets: topk, k: 5, {how}}}", "lmbda=0")
    with pytest.raises(ConfigError, match=r"^teacher\.model: a store holds one teacher"):
        store_teacher(config, tmp_path / "store", "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    with pytest.raises(ConfigError, match=rf"^teacher\.{how.split(':')[0]}: must be null with FSDP"):
        load_teachers(config, tokenizer, torch.device("cpu"), shard=True)


def test_the_checks_want_prompts_of_its_own_for_the_student_as_teacher(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    for data, level, text in (
        (prompts, "ok", "the teacher has the student's weights, and prompts of its own"),
        (lab.data, "warning", "so there is nothing to learn from it without prompts of its own"),
    ):
        trainer = run(lab, data, tmp_path, "ema: 0.5", "lora.r=2")
        found = next(finding for finding in preflight(trainer) if finding.name == "teacher's loss")
        assert found.level == level
        assert found.text.startswith("0 nats per token")
        assert text in found.text


def test_the_header_says_how_the_teacher_follows_the_student(lab: Lab, prompts: Path, tmp_path: Path) -> None:
    for how, told in (
        ("", "the student at the start"),
        ("refresh_every: 2", "the student, copied every 2 steps"),
        ("ema: 0.75", "average of the student's weights, ema 0.75"),
    ):
        assert f"self ({told}): 6,352 parameters in float32" in header(run(lab, prompts, tmp_path, how))
