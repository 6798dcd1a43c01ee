"""The client against a stock vLLM server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from serving_cases import (
    FAST_RETRIES,
)


def vllm_server(logprobs: list[dict[str, Any] | None]) -> tuple[TeacherClient, list[httpx.Request]]:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if request.url.path == "/v1/teacher":
            return httpx.Response(404)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "stock"}]})
        return httpx.Response(200, json={"choices": [{"index": 0, "prompt_logprobs": logprobs}]})

    return TeacherClient("http://vllm", retries=FAST_RETRIES, transport=httpx.MockTransport(handle)), requests


def test_a_stock_vllm_server_is_detected_and_asked_for_prompt_logprobs() -> None:
    position = {
        "7": {"logprob": -0.5, "rank": 1},
        "3": {"logprob": -1.5, "rank": 2},
        "9": {"logprob": -4.0, "rank": 20},
    }
    client, requests = vllm_server([None, position])
    answer = client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)
    assert answer.ids.tolist() == [[7, 3]]
    assert answer.logprobs.tolist() == [[-0.5, -1.5]]
    assert answer.actual_logprobs.tolist() == [-4.0]
    body = json.loads(requests[-1].content)
    assert (body["model"], body["prompt"], body["prompt_logprobs"]) == ("stock", [[1, 9]], 2)


@pytest.mark.parametrize(
    "position", [None, {}, {"7": {"logprob": None, "rank": 1}}, {"7": {"logprob": -0.5, "rank": 1}}]
)
def test_a_number_that_vllm_leaves_out_is_an_error(position: Any) -> None:
    client, _ = vllm_server([None, position])
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1])


def test_the_actual_token_is_not_taken_for_a_missing_likely_one() -> None:
    client, _ = vllm_server([None, {"7": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -4.0, "rank": 30}}])
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)


def test_vllm_may_be_asked_for_the_actual_tokens_alone() -> None:
    client, _ = vllm_server([None, {"9": {"logprob": -4.0, "rank": 30}}])
    assert client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=0).logprobs.shape == (1, 0)


def test_options_that_vllm_lacks_are_refused_with_the_reason() -> None:
    client, _ = vllm_server([])
    with pytest.raises(ValueError, match="temperature must be 1 with a stock vLLM server, which ignores it"):
        client.get_sequence_logprobs([[1, 2]], [1], temperature=0.5)
    with pytest.raises(ValueError, match="score_ids must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], score_ids=[[[1]]])
    with pytest.raises(ValueError, match="vocab_size must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], vocab_size=9)
