"""The vLLM engine's conversion of vLLM's results, with a stand-in for vLLM."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.server.vllm_engine import VllmEngine
from serving_cases import LENGTH, VOCAB, serving


class FakeLLM:
    """Answer with the log-probability -t of token t; fail on a single token."""

    model_config = SimpleNamespace(
        model="fake", revision=None, max_model_len=LENGTH + 1, get_vocab_size=lambda: VOCAB, dtype="float32"
    )
    llm_engine = SimpleNamespace(
        engine_core=SimpleNamespace(shutdown=lambda: None),
        vllm_config=SimpleNamespace(device_config=SimpleNamespace(device_type="cpu")),
    )

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        outputs: list[Any] = []
        for prompt in prompts:
            tokens = prompt["prompt_token_ids"][1:]
            if not tokens:
                raise IndexError("list index out of range")
            flat = SimpleNamespace(
                logprobs=[x for t in tokens for x in (-float(t), *[-9.0] * params.prompt_logprobs)],
                token_ids=[i for t in tokens for i in (t, *range(params.prompt_logprobs))],
            )
            outputs.append(SimpleNamespace(prompt_logprobs=flat))
        return outputs


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize(
    ("sequences", "prompt_lengths", "actual"),
    [
        ([[5]], [1], []),
        ([[5], [6]], [1, 0], []),
        ([[5, 6]], [2], []),
        ([[5], [5, 7, 8], [5, 6], [4, 9]], [1, 1, 2, 0], [-7, -8, -9]),
    ],
)
def test_a_sequence_without_positions_gets_an_empty_answer(
    sequences: list[list[int]], prompt_lengths: list[int], actual: list[float], k: int
) -> None:
    with serving(VllmEngine(FakeLLM())) as served, TeacherClient(served.url) as client:
        answer = client.get_sequence_logprobs(sequences, prompt_lengths, top_logprobs=k)
    assert answer.actual_logprobs.tolist() == actual
    assert answer.logprobs.shape == (len(actual), k)
