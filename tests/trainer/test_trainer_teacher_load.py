"""Tests of `teacher.load`: options of from_pretrained for a local teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.trainer.config import ConfigError, resume_fingerprint
from fused_distill.trainer.loop import Trainer
from fused_distill.trainer.teachers import load_teachers
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def test_options_reach_from_pretrained_and_win_over_attention(lab: Lab, tmp_path: Path) -> None:
    options = "teacher.load={attn_implementation: eager, device_map: cpu}"
    trainer = Trainer(lab.config(tmp_path, options, "attention=sdpa"))
    teacher: Any = trainer.teachers[""]
    assert teacher.model.config._attn_implementation == "eager"
    assert trainer.model.config._attn_implementation == "sdpa"
    assert trainer.update(trainer.fill_buffer())["loss"] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("no_such_option: 1", "TypeError: .*no_such_option"),
        ("attn_implementation: wrong", "ValueError: .*wrong"),
        ("quantization_config: {quant_method: wrong}", "ValueError: .*wrong"),
    ],
)
def test_options_that_from_pretrained_refuses_are_named(
    lab: Lab, tmp_path: Path, options: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^teacher\.load: .* cannot be loaded with {{.*}}: {reason}"):
        Trainer(lab.config(tmp_path, f"teacher.load={{{options}}}"))


def test_a_model_that_is_not_there_is_no_fault_of_the_options(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.model: /nowhere cannot be loaded"):
        Trainer(lab.config(tmp_path, "teacher={model: /nowhere, load: {attn_implementation: eager}}"))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("url: 'http://x', load: {device_map: auto}", "load must be empty with url"),
        ("stored: x, targets: topk, load: {device_map: auto}", "load must be empty with stored"),
        ("model: self, load: {device_map: auto}", "load must not be set with model self"),
        ("model: x, load: {dtype: float16}", "load must not have dtype: set teacher.dtype"),
        (
            "model: x, load: {token: secret}",
            "load must not have token: set the environment",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(lab: Lab, tmp_path: Path, teacher: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.config(tmp_path, f"teacher={{{teacher}}}", "lmbda=0")


def test_a_device_map_is_refused_where_the_teacher_is_sharded(lab: Lab, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    with pytest.raises(ConfigError, match=r"^teacher\.load: must not have device_map with FSDP"):
        load_teachers(
            lab.config(tmp_path, "teacher.load={device_map: cpu}"), tokenizer, torch.device("cpu"), True
        )


def test_only_options_of_the_machine_may_change_on_resume(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(tmp_path, "teacher.load={device_map: cpu, attn_implementation: eager, variant: x}")
    assert resume_fingerprint(config)["teacher.load"] == {"variant": "x"}
