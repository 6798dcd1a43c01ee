"""Against a real vLLM server: `make test-vllm` installs one in a venv of its own and runs these."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.serving.client import TeacherClient
from fused_distill.serving.engine import TransformersEngine
from fused_distill.serving.rollouts import Sampling, TransformersRollouts, VllmRollouts
from test_serving import serving

PYTHON = os.environ.get("FUSED_DISTILL_VLLM_PYTHON")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        PYTHON is None, reason="FUSED_DISTILL_VLLM_PYTHON names no Python with vLLM: make test-vllm"
    ),
]
VOCAB = 98
START_SECONDS = 300


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, of a head size that vLLM has kernels for, with the tiny model's tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # distributions that are not nearly uniform
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-logprobs", "64"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_SERVER_DEV_MODE": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[str]:
    with serving(TransformersEngine.load(str(folder), "cpu", "float32")) as served:
        yield served.url


def texts(count: int) -> tuple[list[list[int]], list[int]]:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, VOCAB, generator.integers(2, 40)).tolist() for _ in range(count)]
    return sequences, [int(generator.integers(0, len(s))) for s in sequences]


@pytest.mark.parametrize("k", [1, 16, 64])
def test_a_stock_vllm_server_and_ours_agree(vllm: str, ours: str, k: int) -> None:
    sequences, prompts = texts(12)
    with TeacherClient(vllm) as stock, TeacherClient(ours) as own:
        theirs: Any = stock.get_sequence_logprobs(sequences, prompts, top_logprobs=k)
        mine = own.get_sequence_logprobs(sequences, prompts, top_logprobs=k)
        assert stock.info()["id"]
    np.testing.assert_array_equal(theirs.lengths, mine.lengths)
    np.testing.assert_allclose(theirs.actual_logprobs, mine.actual_logprobs, atol=1e-4)
    np.testing.assert_allclose(theirs.logprobs, mine.logprobs, atol=1e-4)
    assert (theirs.ids == mine.ids).mean() > 0.99  # near ties may fall either way


def test_a_stock_vllm_server_ignores_temperature_for_prompt_logprobs(vllm: str) -> None:
    # Why the client refuses it there. The day this fails the client may learn to ask.
    body = {"model": httpx.get(f"{vllm}/v1/models").json()["data"][0]["id"], "prompt": [[5, 9, 30]]}
    body |= {"max_tokens": 1, "prompt_logprobs": 3}
    cold, warm = (
        httpx.post(f"{vllm}/v1/completions", json={**body, "temperature": t}, timeout=60).json()
        for t in (0.5, 1.0)
    )
    assert cold["choices"][0]["prompt_logprobs"] == warm["choices"][0]["prompt_logprobs"]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_greedy_rollouts_equal_those_of_transformers(vllm: str, folder: Path) -> None:
    prompts, sampling = [[5, 9, 30], [7], [8, 8]], Sampling(temperature=0, max_tokens=12)
    with VllmRollouts(vllm) as rollouts:
        theirs = rollouts.generate(prompts, sampling, groups=[4, 5, 4])
    mine = TransformersRollouts(load(folder)).generate(prompts, sampling, groups=[4, 5, 4])
    for a, b in zip(theirs, mine, strict=True):
        assert (a.group, a.prompt, a.tokens, a.finish_reason) == (
            b.group,
            b.prompt,
            b.tokens,
            b.finish_reason,
        )
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_seeded_rollouts_repeat_and_differ_within_a_group(vllm: str) -> None:
    with VllmRollouts(vllm) as rollouts:
        first, again = (
            rollouts.generate([[5, 9], [5, 9]], Sampling(n=4, max_tokens=10, seed=3)) for _ in range(2)
        )
    assert first == again
    assert len({tuple(c.tokens) for c in first}) == 8
    assert {c.finish_reason for c in first} <= {"stop", "length"}


def test_rollouts_follow_new_weights_after_a_sync(vllm: str, folder: Path, tmp_path: Path) -> None:
    prompts, sampling = [[5, 9, 30], [7]], Sampling(temperature=0, max_tokens=12)
    changed = load(folder)
    with torch.no_grad():
        changed.lm_head.weight.copy_(changed.lm_head.weight.roll(7, 0))
    changed.save_pretrained(tmp_path)
    with VllmRollouts(vllm) as rollouts:
        before = rollouts.generate(prompts, sampling)
        rollouts.sync_from_disk(tmp_path)
        after = rollouts.generate(prompts, sampling)
        rollouts.sync_from_disk(folder)
        back = rollouts.generate(prompts, sampling)
    want = TransformersRollouts(changed).generate(prompts, sampling)
    assert [c.tokens for c in after] == [c.tokens for c in want] != [c.tokens for c in before]
    assert [c.tokens for c in back] == [c.tokens for c in before]
