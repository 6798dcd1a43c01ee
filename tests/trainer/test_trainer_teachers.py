"""Tests of teachers: local, served by us, and served by stock vLLM and SGLang servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer import teachers
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Batch
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.preflight.server import limits, same_answers
from fused_distill.trainer.preflight.teacher_of_run import teachers_of
from fused_distill.trainer.student import load_pretrained
from fused_distill.trainer.targets import TopKTargets
from fused_distill.trainer.teachers import ServedTeacher
from serving_cases import serving, serving_app
from stock_servers import stock_sglang, stock_vllm
from trainer_cases import NOT_INTERPRETED, Lab, losses, save_model, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with serving(TransformersEngine.load(str(lab.teacher), "cpu", "float32")) as served:
        yield served.url


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_hidden_states_of_a_server_give_the_losses_of_a_local_teacher(
    lab: Lab, url: str, tmp_path: Path
) -> None:
    train(lab.config(tmp_path / "local"))
    train(lab.config(tmp_path / "served", f"teacher.url={url}"))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_a_server_scores_the_students_top_k_as_a_local_teacher(
    lab: Lab, url: str, tmp_path: Path, tail: str
) -> None:
    settings = ["teacher.targets=student_topk", "teacher.k=5", f"teacher.tail={tail}", "temperature=1.5"]
    train(lab.config(tmp_path / "local", *settings))
    train(lab.config(tmp_path / "served", f"teacher.url={url}", *settings))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_ids_beyond_the_students_lm_head_belong_to_the_tail(lab: Lab, url: str, tmp_path: Path) -> None:
    """As a stock vLLM server returns them: 6 of its 104 ids have no row in the student's LM head."""
    settings = [f"teacher.url={url}", "teacher.targets=topk", "teacher.k=98", "lmbda=0"]
    trainer = Trainer(lab.config(tmp_path, *settings))
    assert isinstance(trainer.teachers[""], ServedTeacher)
    trainer.teachers[""].normalizes = False
    batch = Batch.collate(trainer.fill_buffer()[0], torch.device("cpu"))
    targets = trainer.teachers[""].targets(batch, None)
    assert isinstance(targets, TopKTargets)
    beyond = targets.ids >= 98
    assert beyond.any()
    assert (targets.logprobs[beyond] == -torch.inf).all()
    assert trainer.loss(batch, 1.0)[0] > 0


@pytest.mark.parametrize("rows", [98, 104])
def test_lm_heads_of_different_sizes_are_compared_on_their_common_rows(
    lab: Lab, tiny_model: Path, tmp_path: Path, rows: int
) -> None:
    student = save_model(tmp_path / "student", tiny_model, vocab_size=202 - rows)
    teacher = save_model(tmp_path / "teacher", tiny_model, vocab_size=rows, hidden_size=24)
    topk = ", k: 98, tail: renormalize"
    for targets, options in (("full", ""), ("topk", topk), ("student_topk", topk)):
        source = f"teacher={{model: {teacher}, targets: {targets}{options}}}"
        train(lab.config(tmp_path / targets, f"student={student}", source, "lmbda=0"))
    # k covers the common vocabulary; other rows of the student have no probability.
    assert losses(tmp_path / "topk") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)
    assert losses(tmp_path / "student_topk") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)


def test_fsdp_ram_efficient_loading_is_off_for_the_teacher(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen: dict[str, str] = {}

    def watched(auto_class: Any, key: str, name: str, **options: Any) -> Any:
        seen[key] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        return load_pretrained(auto_class, key, name, **options)

    monkeypatch.setattr(teachers, "load_pretrained", watched)
    Trainer(lab.config(tmp_path))
    assert seen["teacher.model"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.fixture(scope="module")
def same_size_teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher with the student's vocabulary size: a stock vLLM server normalizes over all rows."""
    return save_model(tmp_path_factory.mktemp("same_size_teacher"), tiny_model, hidden_size=24)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def stock(request: pytest.FixtureRequest, same_size_teacher: Path) -> Iterator[tuple[str, str]]:
    """The kind and the address of a stock server."""
    app = {"vllm": stock_vllm, "sglang": stock_sglang}[request.param]
    model = transformers.AutoModelForCausalLM.from_pretrained(same_size_teacher)
    with serving_app(app(model)) as served:
        yield request.param, served.url


@pytest.mark.parametrize("targets", ["topk", "student_topk", "sampled"])
def test_a_stock_server_gives_the_losses_of_a_local_teacher(
    lab: Lab, same_size_teacher: Path, stock: tuple[str, str], tmp_path: Path, targets: str
) -> None:
    kind, url = stock
    if (kind, targets) == ("vllm", "student_topk"):
        pytest.skip("vLLM scores no chosen tokens")
    settings = (
        ["objective=sampled"] if targets == "sampled" else [f"teacher.targets={targets}", "teacher.k=5"]
    )
    train(lab.config(tmp_path / "local", *settings, f"teacher.model={same_size_teacher}"))
    train(lab.config(tmp_path / "stock", *settings, f"teacher.url={url}"))
    assert losses(tmp_path / "stock") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_the_preflight_of_a_stock_server_passes(lab: Lab, stock: tuple[str, str], tmp_path: Path) -> None:
    url = stock[1]
    run = Trainer(lab.config(tmp_path, f"teacher.url=[{url}, {url}]", "teacher.targets=topk", "teacher.k=5"))
    of_run = teachers_of(run)[0]
    assert getattr(same_answers(of_run), "text", "") == "all 2 servers give the same answer twice"
    assert "k 5 and the longest sequence fit the server, which takes" in getattr(limits(of_run), "text", "")


NO_SCORES = "teacher.targets: must be topk with this server, .* score_ids"


@pytest.mark.parametrize(
    ("override", "vllm", "sglang"),
    [
        (
            "teacher.targets=full teacher.k=64",
            "teacher.targets: must be topk .* no hidden_states",
            "no hidden_states",
        ),
        ("teacher.targets=student_topk", NO_SCORES, None),
        ("temperature=2", r"temperature: must be 1 with this server, got 2\.0", "must be 1 with this server"),
        (
            "teacher.k=21",
            r"teacher\.url: .*max allowed: 20\. Start vLLM with --max-logprobs 21 or more",
            None,
        ),
        (
            "rollouts.max_completion_length=60",
            r"teacher\.url: a sequence must have at most 63 tokens, .* Start vLLM with --max-model-len",
            r"teacher\.url: a sequence must have at most 57 tokens, .* Start SGLang with --context-length",
        ),
    ],
)
def test_settings_that_a_stock_server_cannot_serve_are_refused(
    lab: Lab, stock: tuple[str, str], tmp_path: Path, override: str, vllm: str, sglang: str | None
) -> None:
    kind, url = stock
    message = {"vllm": vllm, "sglang": sglang}[kind]
    topk = ("teacher.targets=topk", "teacher.k=5")
    config = lab.config(tmp_path, f"teacher.url={url}", *topk, *override.split())
    if message is None:
        Trainer(config)
        return
    with pytest.raises(ConfigError, match=message):
        Trainer(config)
