"""The client against a stock vLLM server."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

import httpx
import pytest
import torch
from fused_distill import fused_linear_topk_jsd
from fused_distill.serving.client.align import align
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from serving_cases import (
    FAST_RETRIES,
)

Position = dict[str, Any] | None


def choices(prompts: list[list[int]], position: Position) -> list[dict[str, Any]]:
    """Return vLLM's choices for some prompts, all of whose positions are alike."""
    return [
        {"index": i, "prompt_logprobs": [None, *[position] * (len(tokens) - 1)]}
        for i, tokens in enumerate(prompts)
    ]


def vllm_server(
    *positions: Position,
    max_model_len: int = 512,
    refuse: str | None = None,
    model: str | None = None,
    down: Collection[str] = (),
) -> tuple[TeacherClient, list[httpx.Request]]:
    """Return a client of a server per position, and the requests they get."""
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if request.url.host in down:
            raise httpx.ConnectError("refused")
        if request.url.path == "/v1/teacher":
            return httpx.Response(404)
        if request.url.path == "/v1/models":
            models = [{"id": "stock", "max_model_len": max_model_len}, {"id": "other", "max_model_len": 9}]
            return httpx.Response(200, json={"data": models})
        if refuse is not None:
            return httpx.Response(400, json={"error": {"message": refuse}})
        body, server = json.loads(request.content), int(str(request.url.host).removeprefix("vllm"))
        return httpx.Response(200, json={"choices": choices(body["prompt"], positions[server])})

    urls = [f"http://vllm{i}" for i in range(max(1, len(positions)))]
    transport = httpx.MockTransport(handle)
    return TeacherClient(urls, model=model, retries=FAST_RETRIES, transport=transport), requests


def test_a_stock_vllm_server_is_detected_and_asked_for_prompt_logprobs() -> None:
    position = {
        "7": {"logprob": -0.5, "rank": 1},
        "3": {"logprob": -1.5, "rank": 2},
        "9": {"logprob": -4.0, "rank": 20},
    }
    client, requests = vllm_server(position)
    answer = client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)
    assert answer.ids.tolist() == [[7, 3]]
    assert answer.logprobs.tolist() == [[-0.5, -1.5]]
    assert answer.actual_logprobs.tolist() == [-4.0]
    body = json.loads(requests[-1].content)
    # The second prompt recognizes the weights.
    assert (body["model"], body["prompt"], body["prompt_logprobs"]) == ("stock", [[1, 9], [1, 9]], 2)


@pytest.mark.parametrize(
    "position", [None, {}, {"7": {"logprob": None, "rank": 1}}, {"7": {"logprob": -0.5, "rank": 1}}]
)
def test_a_number_that_vllm_leaves_out_is_an_error(position: Any) -> None:
    client, _ = vllm_server(position)
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1])


def test_the_actual_token_is_not_taken_for_a_missing_likely_one() -> None:
    client, _ = vllm_server({"7": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -4.0, "rank": 30}})
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)


def test_vllm_may_be_asked_for_the_actual_tokens_alone() -> None:
    client, _ = vllm_server({"9": {"logprob": -4.0, "rank": 30}})
    assert client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=0).logprobs.shape == (1, 0)


def test_options_that_vllm_lacks_are_refused_with_the_reason() -> None:
    client, _ = vllm_server()
    with pytest.raises(ValueError, match="temperature must be 1 with a stock vLLM server, which ignores it"):
        client.get_sequence_logprobs([[1, 2]], [1], temperature=0.5)
    with pytest.raises(ValueError, match="score_ids must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], score_ids=[[[1]]])
    with pytest.raises(ValueError, match="vocab_size must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], vocab_size=9)


FORBIDDEN = -9999.0  # vLLM's -inf


def test_minus_infinity_that_vllm_writes_as_a_number_is_minus_infinity() -> None:
    position = {
        "7": {"logprob": -0.5, "rank": 1},
        "3": {"logprob": FORBIDDEN, "rank": 2},
        "9": {"logprob": FORBIDDEN, "rank": 3},
    }
    client, _ = vllm_server(position)
    answer = client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)
    assert answer.logprobs.tolist() == [[-0.5, -math.inf]]
    assert answer.actual_logprobs.tolist() == [-math.inf]
    assert answer.ids.tolist() == [[7, 3]]


def test_a_very_small_probability_stays_finite() -> None:
    client, _ = vllm_server({"7": {"logprob": -0.0, "rank": 1}, "9": {"logprob": -12000.0, "rank": 2}})
    assert client.get_sequence_logprobs([[1, 9]], [1]).actual_logprobs.tolist() == [-12000.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_forbidden_token_counts_as_probability_zero_in_the_loss(beta: float) -> None:
    vocab, likely, forbidden = 6, math.log(0.9), 3
    position = {"2": {"logprob": likely, "rank": 1}, str(forbidden): {"logprob": FORBIDDEN, "rank": 2}}
    client, _ = vllm_server(position)
    mask = torch.tensor([True])
    aligned = align(client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=2), mask)
    logits = torch.linspace(-1, 1, vocab)
    loss = fused_linear_topk_jsd(
        logits[None], torch.eye(vocab), aligned.logprobs, aligned.ids, mask=mask, beta=beta
    )
    student = logits.double().softmax(-1)
    # Two outcomes: the likely token and everything else, which holds the forbidden one.
    s = torch.stack([student[2], 1 - student[2]])
    t = torch.tensor([0.9, 0.1], dtype=torch.float64)
    m = beta * t + (1 - beta) * s
    want = (
        (t * (t / s).log()).sum()
        if beta == 0
        else (s * (s / t).log()).sum()
        if beta == 1
        else beta * (t * (t / m).log()).sum() + (1 - beta) * (s * (s / m).log()).sum()
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def top(logprob: float) -> Position:
    return {str(token): {"logprob": logprob, "rank": token + 1} for token in range(3)}


def test_a_replica_with_other_weights_is_named_with_both_log_probabilities() -> None:
    down: set[str] = set()
    client, _ = vllm_server(top(-1.0), top(-1.2), down=down)
    client.get_sequence_logprobs([[1, 2, 1]], [1])
    down.add("vllm0")
    with pytest.raises(TeacherError) as error:
        client.get_sequence_logprobs([[2, 1, 0, 1]], [1])
    for part in ("http://vllm1 answers with other weights", r"[-1.20, -1.20, ...]", "http://vllm0", "[-1.00"):
        assert part in str(error.value)


def test_replicas_that_round_differently_have_the_same_weights() -> None:
    down: set[str] = set()
    client, _ = vllm_server(top(-1.0), top(-1.05), down=down)
    for server in ("vllm1", "vllm0", "vllm1"):
        down.clear()
        down.add(server)
        assert client.get_sequence_logprobs([[1, 2, 1]], [1]).lengths.tolist() == [2]


def test_a_sequence_that_leaves_no_room_for_vllms_own_token_is_refused_before_it_is_sent() -> None:
    client, requests = vllm_server(top(-1.0), max_model_len=4)
    assert client.get_sequence_logprobs([[1, 2, 1]], [1]).lengths.tolist() == [2]
    sent = len(requests)
    with pytest.raises(ValueError, match=r"sequences\[1\] must have at most 3 tokens.*max-model-len 5 or"):
        client.get_sequence_logprobs([[1, 2], [1, 2, 1, 2]], [1, 1])
    assert len(requests) == sent


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (
            "Requested prompt logprobs of 64, which is greater than max allowed: 20",
            "Start vLLM with --max-logprobs 64 or more",
        ),
        (
            "This model's maximum context length is 2 tokens.",
            "Start vLLM with --max-model-len 3 or more",
        ),
        ("Token id 200 is out of vocabulary", "http://vllm0: 400 Token id 200 is out of vocabulary"),
    ],
)
def test_a_refusal_is_final_and_names_the_option_to_change(reason: str, advice: str) -> None:
    client, requests = vllm_server(refuse=reason)
    with pytest.raises(TeacherError) as error:
        client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=64)
    assert reason in str(error.value)
    assert advice in str(error.value)
    assert sum(request.url.path == "/v1/completions" for request in requests) == 1


def test_limits_can_be_checked_before_a_run() -> None:
    client, requests = vllm_server(top(-1.0), max_model_len=100)
    client.check_limits(top_logprobs=3, length=99)
    assert json.loads(requests[-1].content)["prompt_logprobs"] == 3
    with pytest.raises(ValueError, match=r"at most 99 tokens, got 100.*--max-model-len 101 or more"):
        client.check_limits(top_logprobs=3, length=100)
    client, _ = vllm_server(refuse="Requested prompt logprobs of 64, which is greater than max allowed: 20")
    with pytest.raises(TeacherError, match="--max-logprobs 64 or more"):
        client.check_limits(top_logprobs=64, length=2)


def test_the_limits_are_those_of_the_named_model() -> None:
    client, _ = vllm_server(top(-1.0), model="other")
    assert client.info()["max_model_len"] == 9
    client, _ = vllm_server(top(-1.0), model="none")
    with pytest.raises(TeacherError, match=r"http://vllm0 has no model 'none', only \['stock', 'other'\]"):
        client.info()
