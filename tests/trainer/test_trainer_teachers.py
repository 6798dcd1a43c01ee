"""Tests of teachers: local, served by us, and served by a stock vLLM server."""

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
from fused_distill.trainer.student import load_pretrained
from fused_distill.trainer.targets import TopKTargets
from fused_distill.trainer.teachers import ServedTeacher
from serving_cases import serving, serving_app
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
    for targets in ("full", "topk", "student_topk"):
        source = f"teacher={{model: {teacher}, targets: {targets}, k: 98, tail: renormalize}}"
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


class StockVllm:
    """The endpoints of vLLM's OpenAI server that the client uses, computed by a transformers model."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        models = {"data": [{"id": "stock", "max_model_len": 64}]}
        answers = {"/v1/models": models, "/v1/completions": None}
        status, answer = 200, answers.get(request.url.path, {"error": "Not Found"})
        if request.url.path == "/v1/completions":
            body = await request.json()
            rows = [self.prompt_logprobs(tokens, body["prompt_logprobs"]) for tokens in body["prompt"]]
            answer = {"choices": [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]}
            if body["prompt_logprobs"] > 20:
                status, answer = 400, {"error": {"message": "prompt logprobs: max allowed: 20"}}
        elif request.url.path not in answers:
            status = 404
        await JSONResponse(answer, status)(scope, receive, send)

    @torch.no_grad()
    def prompt_logprobs(self, tokens: list[int], k: int) -> list[Any]:
        logprobs = self.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        positions: list[Any] = [None]
        for row, actual in zip(logprobs, tokens[1:], strict=False):
            ranked = row.argsort(descending=True).tolist()
            kept = {*ranked[:k], actual}
            positions.append({str(t): {"logprob": row[t].item(), "rank": ranked.index(t) + 1} for t in kept})
        return positions


@pytest.fixture(scope="module")
def same_size_teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher with the student's vocabulary size: a stock vLLM server normalizes over all rows."""
    return save_model(tmp_path_factory.mktemp("same_size_teacher"), tiny_model, hidden_size=24)


@pytest.fixture(scope="module")
def stock_url(same_size_teacher: Path) -> Iterator[str]:
    with serving_app(StockVllm(same_size_teacher)) as served:
        yield served.url


def test_top_k_of_a_stock_vllm_server_gives_the_losses_of_a_local_teacher(
    lab: Lab, same_size_teacher: Path, stock_url: str, tmp_path: Path
) -> None:
    settings = ["teacher.targets=topk", "teacher.k=5"]
    train(lab.config(tmp_path / "local", *settings, f"teacher.model={same_size_teacher}"))
    train(lab.config(tmp_path / "stock", *settings, f"teacher.url={stock_url}"))
    assert losses(tmp_path / "stock") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "teacher.targets=full",
            "teacher.targets: must be topk with this server, which has no hidden_states",
        ),
        ("teacher.targets=student_topk", "teacher.targets: must be topk with this server, .* score_ids"),
        ("temperature=2", r"temperature: must be 1 with this server, got 2\.0"),
        ("teacher.k=21", r"teacher\.url: .*max allowed: 20\. Start vLLM with --max-logprobs 21 or more"),
        (
            "rollouts.max_completion_length=60",
            r"teacher\.url: a sequence must have at most 63 tokens, .* Start vLLM with --max-model-len",
        ),
    ],
)
def test_settings_that_a_stock_vllm_server_cannot_serve_are_refused(
    lab: Lab, stock_url: str, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(
            lab.config(tmp_path, f"teacher.url={stock_url}", "teacher.targets=topk", "teacher.k=5", override)
        )
