"""The client against an SGLang server, for which a stand-in answers as SGLang's sources say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.protocol.sglang import sglang_answer
from serving_cases import FAST_RETRIES, Served, random_sequences, serving_app
from stock_servers import stock_sglang


@pytest.fixture(scope="module")
def sglang(model: Any) -> Iterator[Served]:
    with serving_app(stock_sglang(model)) as served:
        yield served


def requests_of(served: Served) -> list[dict[str, Any]]:
    return served.server.config.app.state.requests  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


def test_answers_are_those_of_the_model(model: Any, sglang: Served) -> None:
    sequences, prompt_lengths = random_sequences(9)
    with TeacherClient(sglang.url, request_tokens=60) as client:
        answer = client.get_sequence_logprobs(sequences, prompt_lengths, top_logprobs=5)
    parts = zip(sequences, prompt_lengths, answer.split(), strict=True)
    for tokens, prompt_length, part in parts:
        start = max(prompt_length, 1)
        rows = direct(model, tokens)[start - 1 : -1]
        assert part.logprobs == pytest.approx(rows.topk(5).values.numpy(), abs=1e-5)
        assert part.ids.tolist() == rows.topk(5).indices.tolist()
        actual = [row[token].item() for row, token in zip(rows, tokens[start:], strict=True)]
        assert part.actual_logprobs == pytest.approx(actual, abs=1e-5)


def direct(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_chosen_tokens_are_scored_at_their_own_positions(model: Any, sglang: Served) -> None:
    sequences, prompt_lengths = [[1, 2, 3, 4, 5], [7, 8, 9]], [2, 0]
    score_ids = [[[3, 40], [4, 41], [5, 3]], [[8, 2], [9, 2]]]
    with TeacherClient(sglang.url) as client:
        answer = client.get_sequence_logprobs(sequences, prompt_lengths, top_logprobs=0, score_ids=score_ids)
    assert answer.logprobs.shape == (5, 0)
    rows = [*direct(model, sequences[0])[1:-1], *direct(model, sequences[1])[:-1]]
    want = [row[ids].tolist() for row, ids in zip(rows, [*score_ids[0], *score_ids[1]], strict=True)]
    assert answer.score_logprobs == pytest.approx(np.array(want), abs=1e-5)


def test_the_prompt_is_left_out_of_the_answer_and_nothing_is_generated(sglang: Served) -> None:
    with TeacherClient(sglang.url) as client:
        client.get_sequence_logprobs([[1, 2, 3, 4], [5, 6]], [3, 0], top_logprobs=0)
    body = requests_of(sglang)[-1]
    # The third sequence recognizes the weights.
    assert body["input_ids"] == [[1, 2, 3, 4], [5, 6], [1, 2, 3, 4]]
    assert (body["logprob_start_len"], body["top_logprobs_num"]) == ([2, 0, 0], 1)
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 0}
    assert "token_ids_logprob" not in body
    assert "lora_path" not in body


@pytest.mark.parametrize("old", [False, True])
def test_the_longest_sequence_is_that_of_the_server(model: Any, old: bool) -> None:
    with serving_app(stock_sglang(model, context=30, old=old)) as served, TeacherClient(served.url) as client:
        assert client.info()["max_length"] == 23
        client.check_limits(top_logprobs=5, length=23)
        message = r"a sequence must have at most 23 tokens, got 24: .* --context-length 31 or more"
        with pytest.raises(ValueError, match=message):
            client.check_limits(top_logprobs=5, length=24)
        with pytest.raises(ValueError, match=r"sequences\[1\] must have at most 23 tokens, got 40"):
            client.get_sequence_logprobs([[1, 2], [1] * 40], [1, 1])


def test_options_that_sglang_lacks_are_refused_with_the_reason(sglang: Served) -> None:
    with TeacherClient(sglang.url) as client:
        with pytest.raises(ValueError, match="temperature must be 1 with an SGLang server, which ignores it"):
            client.get_sequence_logprobs([[1, 2]], [1], temperature=0.5)
        with pytest.raises(ValueError, match="vocab_size must be None with an SGLang server"):
            client.get_sequence_logprobs([[1, 2]], [1], vocab_size=9)
        with pytest.raises(ValueError, match="a stock SGLang server gives no hidden states"):
            client.get_hidden_states([[1, 2]], [1])


def test_an_adapter_is_asked_for_by_its_name(sglang: Served) -> None:
    with TeacherClient(sglang.url, model="adapter") as client:
        client.get_sequence_logprobs([[1, 2]], [1])
    assert requests_of(sglang)[-1]["lora_path"] == "adapter"


def test_a_replica_with_other_weights_is_named(model: Any, sglang: Served) -> None:
    class Changed:
        def __call__(self, input_ids: torch.Tensor) -> Any:
            output = model(input_ids=input_ids)
            output.logits = output.logits.roll(3, -1)
            return output

    with serving_app(stock_sglang(Changed())) as other, TeacherClient(sglang.url) as client:
        client.get_sequence_logprobs([[1, 2, 3]], [1])
        client._http.urls = [other.url]  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(TeacherError, match=f"{other.url} answers with other weights"):
            client.get_sequence_logprobs([[1, 2, 3]], [1])


def position(*logprobs: float | None) -> list[Any]:
    return [(logprob, token, None) for token, logprob in enumerate(logprobs)]


@pytest.mark.parametrize(
    ("likely", "actual", "want", "top"),
    [
        (position(-0.5, None), None, -math.inf, [-0.5, -math.inf]),  # forbidden tokens
        (position(None, None), None, math.nan, [math.nan, math.nan]),  # NaN logits
        (position(-0.5), -1.0, -1.0, [math.nan, math.nan]),  # a likely token is missing
        (None, -1.0, -1.0, [math.nan, math.nan]),
    ],
)
def test_null_is_minus_infinity_where_the_likeliest_token_has_a_number(
    likely: Any, actual: float | None, want: float, top: list[float]
) -> None:
    info = {
        "input_token_logprobs": [(None, 1, None), (actual, 2, None)],
        "input_top_logprobs": [None, likely],
    }
    answer = sglang_answer([{"meta_info": info}], 2, None)
    np.testing.assert_array_equal(answer.actual_logprobs, [want])
    np.testing.assert_array_equal(answer.logprobs, [top])


@pytest.mark.parametrize("refusal", ["status", "abort"])
def test_a_refusal_is_final_and_says_what_to_change(refusal: str) -> None:
    sent: list[str] = []
    reason = "The input (2 tokens) is longer than the model's context length (1 tokens)."

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "owned_by": "sglang"}]})
        if request.url.path != "/generate":
            return httpx.Response(404)
        if refusal == "status":
            return httpx.Response(400, json={"error": {"message": reason}})
        abort = {"finish_reason": {"type": "abort", "message": reason}}
        return httpx.Response(200, json=[{"meta_info": abort}] * 2)

    transport = httpx.MockTransport(handle)
    with (
        TeacherClient("http://sglang", retries=FAST_RETRIES, transport=transport) as client,
        pytest.raises(TeacherError, match=r"context length \(1 tokens\).*--context-length 9 or more"),
    ):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert sent.count("/generate") == 1
