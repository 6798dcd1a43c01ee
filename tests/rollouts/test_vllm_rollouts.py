"""Rollouts by a vLLM server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.serving.client.retry import RetryPolicy, ServerError


def choice(index: int, **changes: Any) -> dict[str, Any]:
    defaults = {
        "index": index,
        "token_ids": [index],
        "logprobs": {"token_logprobs": [-1.0]},
        "finish_reason": "stop",
    }
    return {**defaults, **changes}


def vllm(*choices: dict[str, Any]) -> VllmRollouts:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"choices": list(choices)}))
    return VllmRollouts("http://vllm", model="m", transport=transport, retries=RetryPolicy(2, 0.01, 0.01))


def test_a_servers_choices_are_ordered_by_index() -> None:
    completions = vllm(choice(3), choice(0), choice(2), choice(1)).generate(
        [[5], [6]], Sampling(n=2), groups=[8, 4]
    )
    assert [(c.group, c.prompt, c.tokens) for c in completions] == [
        (8, [5], [0]),
        (8, [5], [1]),
        (4, [6], [2]),
        (4, [6], [3]),
    ]


@pytest.mark.parametrize(
    "choices",
    [[choice(0)], [choice(0), choice(1, finish_reason="abort")], [choice(0), choice(1, token_ids=[1, 2])]],
)
def test_an_incomplete_answer_is_an_error(choices: list[dict[str, Any]]) -> None:
    with pytest.raises(ServerError, match=r"expected 2|incomplete"):
        vllm(*choices).generate([[5], [6]], Sampling())


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="folder must hold a checkpoint"):
        vllm().sync_from_disk("/nowhere")


def test_a_server_is_told_to_sample_the_model_itself() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [choice(0)]})

    with VllmRollouts("http://vllm", model="m", transport=httpx.MockTransport(answer)) as rollouts:
        rollouts.generate([[5]], Sampling())
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
    assert neutral.items() <= bodies[-1].items()


def test_a_prefix_cache_that_was_kept_is_an_error(tiny_model: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(200, json={"success": request.url.path != "/reset_prefix_cache"})

    retries = RetryPolicy(attempts=2, first_wait_seconds=0.01)
    with (
        VllmRollouts("http://vllm", transport=httpx.MockTransport(answer), retries=retries) as rollouts,
        pytest.raises(ServerError, match="did not reset its prefix cache"),
    ):
        rollouts.sync_from_disk(tiny_model)


def test_completions_are_grouped_by_an_explicit_id() -> None:
    # The server's order is any, prompts repeat in different groups, and groups have different sizes.
    choices = [choice(i) for i in range(6)]
    random.Random(0).shuffle(choices)
    completions = vllm(*choices).generate([[5], [5], [5]], Sampling(n=2), groups=[7, 3, 7])
    members = {group: {c.tokens[0] for c in completions if c.group == group} for group in (3, 7)}
    assert members == {7: {0, 1, 4, 5}, 3: {2, 3}}


def bodies_of(sampling: Sampling, vocab_size: int | None) -> list[dict[str, Any]]:
    """Return the requests of a call."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [choice(0)]})

    transport = httpx.MockTransport(answer)
    with VllmRollouts("http://vllm", model="m", vocab_size=vocab_size, transport=transport) as rollouts:
        rollouts.generate([[5]], sampling)
    return bodies


def test_a_server_is_told_further_end_tokens_and_tokens_to_exclude() -> None:
    [body] = bodies_of(Sampling(stop_token_ids=(3, 4), vocab_size=10), 12)
    assert body["stop_token_ids"] == [3, 4]
    assert body["logit_bias"] == {"10": -100.0, "11": -100.0}
    assert "vocab_size" not in body
    [body] = bodies_of(Sampling(vocab_size=12), 12)
    assert "logit_bias" not in body


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(None, "vocab_size of the model"), (2000, "at most 1024")]
)
def test_tokens_that_cannot_be_excluded_are_an_error(vocab_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bodies_of(Sampling(vocab_size=10), vocab_size)


def test_a_server_is_asked_for_one_of_n_greedy_completions() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [choice(0), choice(1)]})

    with VllmRollouts("http://vllm", model="m", transport=httpx.MockTransport(answer)) as rollouts:
        completions = rollouts.generate([[5], [6]], Sampling(n=2, temperature=0), groups=[8, 4])
    assert [body["n"] for body in bodies] == [1]
    assert [(c.group, c.tokens) for c in completions] == [(8, [0]), (8, [0]), (4, [1]), (4, [1])]
