"""Tests of several teachers, one of which each row of the data names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.loop import NonFiniteLoss, Trainer, train
from fused_distill.trainer.preflight import preflight
from fused_distill.trainer.teachers import load_teachers
from plain_loop import BETAS, assert_equals_plain_steps
from trainer_cases import (
    NOT_INTERPRETED,
    SETTINGS,
    Lab,
    assert_same_run,
    losses,
    metrics,
    save_model,
    transformers,
)
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), tiny_model, hidden_size=32)


def settings(lab: Lab, output: Path, *overrides: str, **teachers: str) -> TrainConfig:
    """Return the settings of a run with several teachers, whose data alternates between their names."""
    from fused_distill.trainer.config import load_config

    output.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
    names = [*teachers]
    for i, row in enumerate(rows):
        row["teacher"] = names[i * i % 3 % len(names)]
    (output / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output / "settings.yaml").write_text(SETTINGS)
    paths = [f"student={lab.student}", f"output={output}", f"data.path={output}/data.jsonl"]
    sources = [f"teachers.{name}={{{source}}}" for name, source in teachers.items()]
    return load_config(output / "settings.yaml", [*paths, *sources, *overrides])


@BETAS
def test_ten_steps_with_two_teachers_equal_a_plain_pytorch_loop(
    lab: Lab, other: Path, tmp_path: Path, beta: float
) -> None:
    options = (f"beta={beta}", "lmbda=0", "steps=10", "learning_rate=0.001", "gradient_accumulation_steps=2")
    teachers = {"math": f"model: {lab.teacher}", "code": f"model: {other}"}
    assert_equals_plain_steps(Trainer(settings(lab, tmp_path, *options, **teachers)), beta, 10)


def test_one_teacher_under_two_names_gives_the_losses_of_one(lab: Lab, tmp_path: Path) -> None:
    source = f"model: {lab.teacher}, targets: student_topk, k: 5"
    two = settings(lab, tmp_path / "two", "tokens_per_forward=60", math=source, code=source)
    one = lab.config(tmp_path / "one", f"teacher={{{source}}}", "tokens_per_forward=60")
    for config in (two, one):
        train(config)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_metrics_of_each_teacher_make_up_those_of_all(lab: Lab, other: Path, tmp_path: Path) -> None:
    teachers = {"math": f"model: {lab.teacher}", "code": f"model: {other}, targets: topk, k: 4"}
    train(settings(lab, tmp_path, "steps=2", "data.evaluation_prompts=6", **teachers))
    for row in metrics(tmp_path) + metrics(tmp_path, "evaluation"):
        assert row["math/tokens"] + row["code/tokens"] == row["tokens"]
    of_both = [(row, "loss") for row in metrics(tmp_path)]
    of_both += [
        (row, name) for row in metrics(tmp_path, "evaluation") for name in ("forward_kl", "top1_agreement")
    ]
    for row, name in of_both:
        total = sum(row[f"{teacher}/{name}"] * row[f"{teacher}/tokens"] for teacher in teachers)
        assert row[name] == pytest.approx(total / row["tokens"])


def test_a_mean_is_over_the_teachers_that_log_the_metric(lab: Lab, other: Path, tmp_path: Path) -> None:
    teachers = {"math": f"model: {lab.teacher}", "code": f"model: {other}, targets: topk, k: 4"}
    train(settings(lab, tmp_path, "steps=1", "data.evaluation_prompts=6", **teachers))
    [row], evaluation = metrics(tmp_path), metrics(tmp_path, "evaluation")[0]
    assert row["forward_kl"] == row["math/forward_kl"]
    assert row["topk_forward_kl"] == row["code/topk_forward_kl"]
    assert row["student_mass"] == row["code/student_mass"]
    assert not {"code/forward_kl", "math/topk_forward_kl", "math/student_mass"} & {*row}
    assert evaluation["loss"] == evaluation["math/loss"]
    assert evaluation["full_loss"] == evaluation["code/full_loss"]


def test_metrics_of_a_single_teacher_have_no_prefix(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=1"))
    names = [name for name in metrics(tmp_path)[0] if "/" in name]
    assert sorted(names) == ["on_policy/loss", "on_policy/tokens"]


def test_every_teacher_of_several_passes_the_checks_before_the_run(
    lab: Lab, other: Path, tmp_path: Path
) -> None:
    config = settings(lab, tmp_path, math=f"model: {lab.teacher}", code=f"model: {other}")
    found = {finding.name: finding.level for finding in preflight(Trainer(config))}
    for name in ("math", "code"):
        assert [found[f"teacher {name}'s {what}"] for what in ("loss", "LM head")] == ["ok", "ok"]


def test_a_local_and_a_stored_teacher_train_together(lab: Lab, other: Path, tmp_path: Path) -> None:
    topk = "targets: topk, k: 5"
    config = lab.config(tmp_path / "store", f"teacher={{model: {other}, {topk}}}", "lmbda=0")
    store_teacher(config, tmp_path / "folder", "float32")
    math = f"model: {lab.teacher}"
    for name, code in (
        ("local", f"model: {other}, {topk}"),
        ("stored", f"stored: {tmp_path}/folder, {topk}"),
    ):
        train(settings(lab, tmp_path / name, "lmbda=0", math=math, code=code))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_the_column_of_the_teachers_names_can_be_chosen(lab: Lab, tmp_path: Path) -> None:
    config = settings(lab, tmp_path, "data.teacher_column=domain", math=f"model: {lab.teacher}")
    data = Path(str(config.data.path))
    data.write_text(data.read_text().replace('"teacher"', '"domain"'))
    assert {s.teacher for s in Trainer(config).fill_buffer()[0]} == {"math"}


@pytest.mark.parametrize(("name", "quoted"), [("law", "'law'"), (None, "None"), (3, "3")])
def test_an_unknown_teacher_in_the_data_is_named_before_models_load(
    lab: Lab, tmp_path: Path, name: Any, quoted: str
) -> None:
    config = settings(lab, tmp_path, math="model: /nowhere", code="model: /nowhere")
    row = {"prompt": "a", "completion": "b"}
    rows = [row | {"teacher": "math" if isinstance(name, str | None) else 1}, row | {"teacher": name}]
    Path(str(config.data.path)).write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ConfigError) as error:
        Trainer(config)
    first = 1 if isinstance(name, str | None) else 0
    expected = f"{tmp_path}/data.jsonl: row {first}: column teacher: must be one of math, code, got "
    assert expected in str(error.value)
    assert quoted in str(error.value) or not first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model=x"], "one of teacher and teachers must be set"),
        (["teachers={}"], "one of teacher and teachers must be set"),
        (["teachers.law={}"], "teachers.law: must have one of model, url and stored"),
        (["teachers.law={stored: s, targets: topk}"], "lmbda must be 0 with teacher.stored"),
    ],
)
def test_impossible_teachers_are_refused(
    lab: Lab, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(lab, tmp_path, *overrides, math="model: m")


def test_an_error_of_one_teacher_has_its_key(lab: Lab, tmp_path: Path) -> None:
    config = settings(lab, tmp_path, math=f"model: {lab.teacher}", code="model: /nowhere")
    with pytest.raises(ConfigError, match=r"^teachers\.code\.model: /nowhere cannot be loaded"):
        Trainer(config)


def test_several_models_are_refused_if_they_would_be_sharded(lab: Lab, tmp_path: Path) -> None:
    config = settings(lab, tmp_path, math="model: /nowhere", code="url: http://localhost:1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    with pytest.raises(ConfigError, match=r"^teachers: with FSDP only a single teacher may have a model"):
        load_teachers(config, tokenizer, torch.device("cpu"), shard=True)


def test_a_store_is_of_one_teacher(lab: Lab, tmp_path: Path) -> None:
    config = settings(lab, tmp_path, math=f"model: {lab.teacher}, targets: topk")
    with pytest.raises(ConfigError, match="teachers: a store holds one teacher"):
        store_teacher(config, tmp_path / "store", "float32")


def test_a_loss_of_one_teacher_that_is_not_finite_names_its_tokens(
    lab: Lab, other: Path, tmp_path: Path
) -> None:
    trainer = Trainer(
        settings(lab, tmp_path, "lmbda=0", math=f"model: {lab.teacher}", code=f"model: {other}")
    )
    broken: Any = trainer.teachers["code"]
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[:] = torch.nan
    buffer = trainer.fill_buffer()
    first = next(s for s in buffer[0] if s.teacher == "code" and s.completion)
    with pytest.raises(NonFiniteLoss, match=f"row {first.row} of the data, token {len(first.prompt)} "):
        trainer.update(buffer)


@pytest.mark.parametrize("name", ["on_policy", "off_policy", "a/b", "' a'", '"a\\nb"'])
def test_names_that_would_spoil_the_metrics_are_refused(lab: Lab, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"teachers: .* is no name for metrics such as NAME/loss"):
        settings(lab, tmp_path, f"teachers={{{name}: {{model: m}}}}", math="model: m")


def test_a_resumed_run_with_several_teachers_is_exact(lab: Lab, other: Path, tmp_path: Path) -> None:
    teachers = {"math": f"model: {lab.teacher}", "code": f"model: {other}, targets: topk, k: 4"}
    train(settings(lab, tmp_path / "at_once", "lmbda=0.5", "steps=4", **teachers))
    for steps in (2, 4):
        train(settings(lab, tmp_path / "parts", "lmbda=0.5", f"steps={steps}", **teachers), resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "at_once")


def test_changed_weights_of_one_of_two_teachers_are_named_on_resume(
    lab: Lab, other: Path, tmp_path: Path
) -> None:
    math = f"model: {lab.teacher}"
    train(settings(lab, tmp_path, "steps=1", math=math, code=f"model: {other}"))
    changed = settings(lab, tmp_path, "steps=2", math=math, code=f"model: {lab.teacher}")
    with pytest.raises(ConfigError, match=r"^teacher code: other weights than before"):
        train(changed, resume=True)
