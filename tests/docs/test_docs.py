"""Code blocks of README and docs run, and the documentation site builds without a warning."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from cases import INTERPRETED
from fastapi import FastAPI, Request
from fused_distill.cli import parse_arguments
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer.config import load_config
from serving_cases import serving, serving_app
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VOCAB, BATCH, LENGTH, PROMPT = 100, 2, 9, 4


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def tiny(hidden_size: int) -> Any:
    torch.manual_seed(hidden_size)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def prompt_logprobs(model: Any, tokens: list[int]) -> list[Any]:
    """Return vLLM's prompt_logprobs of the actual tokens."""
    logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    rows = zip(logprobs, tokens[1:], strict=False)
    return [None, *({str(t): {"logprob": row[t].item(), "rank": 1}} for row, t in rows)]


def stand_in_for_vllm(model: Any) -> FastAPI:
    """Serve the endpoints that `VllmRollouts` needs of a vLLM server, by transformers."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "student"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        if "prompt_logprobs" in body:
            return {"choices": [{"index": 0, "prompt_logprobs": prompt_logprobs(model, *body["prompt"])}]}
        sampling = Sampling(n=body["n"], max_tokens=body["max_tokens"], seed=body["seed"])
        generated = TransformersRollouts(model).generate(body["prompt"], sampling)
        return {
            "choices": [
                {
                    "index": i,
                    "token_ids": c.tokens,
                    "logprobs": {"token_logprobs": c.logprobs},
                    "finish_reason": c.finish_reason,
                }
                for i, c in enumerate(generated)
            ]
        }

    @app.post("/collective_rpc")
    @app.post("/reset_prefix_cache")
    def done() -> Any:
        return {"success": True}

    return app


def tiny_tokenizer() -> Any:
    """Return a tokenizer that knows a few words and pads with token 0."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "what", "is", "this"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


class Environment(dict[str, Any]):
    """Variables that the pages use without defining them."""

    def __init__(self, folder: Path):
        student, teacher = tiny(8), tiny(16)
        tokens = torch.randint(2, VOCAB, (BATCH, LENGTH))
        attention = torch.ones_like(tokens)
        completion_mask = (torch.arange(LENGTH) >= PROMPT).expand(BATCH, LENGTH)
        with torch.no_grad():
            hidden = [m.get_decoder()(input_ids=tokens).last_hidden_state for m in (student, teacher)]
        super().__init__(
            student=student,
            teacher=teacher,
            tokens=tokens,
            attention=attention,
            completion_mask=completion_mask,
            student_hidden=hidden[0].requires_grad_(),
            teacher_hidden=hidden[1],
            student_head=student.lm_head.weight,
            labels=tokens,
            tokens_of_the_step=20,
            sequences=tokens.tolist(),
            prompt_lengths=[PROMPT] * BATCH,
            mask=torch.cat([completion_mask[:, 1:], torch.zeros(BATCH, 1, dtype=torch.bool)], 1),
            tokenizer=tiny_tokenizer(),
            questions=["what is this", "what"],
            prompts=[[3, 4, 5], [6]],
            prompt_ids=[0, 1],
            folder=folder,
        )


@contextlib.contextmanager
def served(names: Environment) -> Iterator[dict[str, str]]:
    """Map the addresses on the pages to those of running servers."""
    app = stand_in_for_vllm(names["student"])
    with serving(TransformersEngine(names["teacher"])) as teacher, serving_app(app) as vllm:
        yield {"http://127.0.0.1:8000": teacher.url, "http://127.0.0.1:8001": vllm.url}


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[DeviceMesh]:
    """Make a device mesh of this process alone."""
    address = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = Environment(tmp_path / "checkpoint")
    with served(names) as addresses, one_process(tmp_path) as names["mesh"]:
        for code in blocks(page, "python"):
            for address, running in addresses.items():
                code = code.replace(address, running)
            exec(compile(code, f"{page.name}:\n{code}", "exec"), names)
    if "loss" in names:
        assert names["loss"].isfinite()


def test_before_and_after_of_the_readme_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    names = Environment(tmp_path)
    student = names["student"]
    before, after = blocks(ROOT / "README.md", "python")[:2]
    exec(before, names)
    loss = names["loss"]
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    exec(after, names)
    assert loss > 0
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_settings_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    for code in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(code)
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    """Parse fused-distill commands and look up targets of make; pip and accelerate run elsewhere."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["fused-distill"]:
            parse_arguments(words[1:])
        elif words[:1] == ["make"]:
            assert words[1] in targets


def test_the_settings_of_the_demo_are_valid() -> None:
    config = load_config(ROOT / "examples" / "demo.yaml")
    assert len(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)).splitlines()) <= 25


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fused_linear_topk_jsd" in (tmp_path / "api" / "index.html").read_text()
