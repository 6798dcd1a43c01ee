"""The server's endpoints, authentication, limits and shutdown."""

from __future__ import annotations

import base64
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import ServerError
from fused_distill.serving.protocol.hidden_states import decode_hidden
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary
from fused_distill.serving.protocol.packing import VERSION
from fused_distill.serving.protocol.request import ScoringOptions, TokenSequence
from fused_distill.serving.server.app import create_app
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.serving.server.validation import ServerLimits
from serving_cases import (
    LENGTH,
    VALID_BODY,
    VOCAB,
    FakeEngine,
    Served,
    assert_same_response,
    from_json,
    in_background,
    post,
    serving,
    wait_until,
)


def test_binary_base64_and_json_responses_carry_the_same_fields(url: str) -> None:
    body = {
        "sequences": [[1, 2, 3, 4], [5, 6]],
        "prompt_lengths": [2, 0],
        "top_logprobs": 3,
        "score_ids": [[[1], [2]], [[3]]],
    }
    binary = decode_binary(post(url, **body, response_format="binary").content)
    assert_same_response(from_json(post(url, **body, response_format="json").json()), binary)
    wrapped = post(url, **body, response_format="base64").json()
    assert wrapped["version"] == VERSION
    assert_same_response(decode_binary(base64.b64decode(wrapped["binary"])), binary)


def test_a_body_that_is_too_large_is_refused_unread(model: Any) -> None:
    with serving(TransformersEngine(model), limits=ServerLimits(body_bytes=1000)) as served:
        response = httpx.post(f"{served.url}/get_sequence_logprobs/", content=b"x" * 1001)
        assert response.status_code == 413


def test_a_body_without_a_length_is_refused(url: str) -> None:
    response = httpx.post(f"{url}/get_sequence_logprobs/", content=iter([b"{}"]))
    assert response.status_code == 411


def test_requests_without_the_bearer_token_are_refused(model: Any) -> None:
    with serving(TransformersEngine(model), token="secret") as served:
        assert httpx.get(f"{served.url}/v1/teacher").status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        with TeacherClient(served.url, token="secret") as client:
            assert client.info()["vocab_size"] == VOCAB
        with TeacherClient(served.url, token="other") as client, pytest.raises(ServerError, match="401"):
            client.get_sequence_logprobs([[1, 2]], [1])


def test_the_teacher_describes_itself(url: str) -> None:
    with TeacherClient(url) as client:
        info = client.info()
    assert info["vocab_size"] == VOCAB
    assert info["max_length"] == LENGTH
    assert info["wire_version"] == VERSION


def test_metrics_count_requests_and_positions(model: Any) -> None:
    with serving(TransformersEngine(model)) as served:
        post(served.url, sequences=[[1, 2, 3, 4]], prompt_lengths=[1])
        post(served.url, sequences=[[1, 2]], prompt_lengths=[9])
        text = httpx.get(f"{served.url}/metrics").text
    assert 'teacher_requests_total{status="200"} 1.0' in text
    assert 'teacher_requests_total{status="422"} 1.0' in text
    assert "teacher_positions_total 3.0" in text
    assert "teacher_waiting_requests 0.0" in text


class BrokenEngine(FakeEngine):
    """Answers that do not fit together, then NaN, then too few, then a way out of the process."""

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> list[TeacherLogprobs]:
        good = super().score(batch, options)
        call = len(self.batches)
        if call == 1:
            bad = good[0]
            return [
                TeacherLogprobs(
                    bad.lengths, np.zeros((1, 9), np.float32), np.zeros((1, 9), np.int32), bad.actual_logprobs
                ),
                *good[1:],
            ]
        if call == 2:
            good[0].actual_logprobs[:] = np.nan
        if call == 4:
            raise SystemExit(1)
        return good[:1] if call == 3 else good


@pytest.mark.parametrize("response_format", ["binary", "json"])
def test_invalid_answers_of_an_engine_are_500_and_the_server_lives(response_format: str) -> None:
    with serving(BrokenEngine()) as served:
        body = {"sequences": [[1, 2], [3, 4]], "prompt_lengths": [1, 1], "response_format": response_format}
        assert [post(served.url, **body).status_code for _ in range(5)] == [500, 500, 500, 500, 200]


def test_a_request_that_takes_too_long_answers_504() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, limits=ServerLimits(request_seconds=0.2)) as served:
        assert post(served.url, **VALID_BODY).status_code == 504
        engine.gate.set()
        wait_until(lambda: post(served.url, **VALID_BODY).status_code == 200)


def test_a_stopping_server_answers_pending_requests() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    served = Served(create_app(engine))
    with in_background(1, lambda _: post(served.url, **VALID_BODY)) as futures:
        assert engine.started.wait(30)
        served.server.should_exit = True
        time.sleep(0.3)
        engine.gate.set()
        assert futures[0].result().status_code == 200
    served.stop()


def test_health_reports_an_engine_that_fails_on_every_batch() -> None:
    engine = FakeEngine()
    with serving(engine) as served:
        for _ in range(5):
            assert httpx.get(f"{served.url}/health").status_code == 200
            assert post(served.url, sequences=[[13, 1]], prompt_lengths=[1]).status_code == 500
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert post(served.url, sequences=[[1, 2]], prompt_lengths=[1]).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_bfloat16_states_take_two_bytes_a_number(url: str) -> None:
    body = {"sequences": [[1] * 40], "prompt_lengths": [0], "response": "hidden_states"}
    payload = post(url, **body, response_format="binary").content
    assert decode_hidden(payload).states.dtype == torch.bfloat16
    assert len(payload) < 39 * 16 * 2 + 300  # the header of a safetensors file


def test_binary_and_base64_carry_the_same_hidden_states(url: str) -> None:
    body = {"sequences": [[1, 2, 3], [4, 5]], "prompt_lengths": [1, 0], "response": "hidden_states"}
    binary = decode_hidden(post(url, **body, response_format="binary").content)
    content = post(url, **body, response_format="base64").json()
    other = decode_hidden(base64.b64decode(content["binary"]))
    assert torch.equal(binary.states, other.states)
    assert binary.head_sha256 == other.head_sha256


def test_a_head_that_the_client_has_is_not_sent_again(url: str) -> None:
    head = f"{url}/v1/teacher/head"
    tag = httpx.head(head).headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        answer = httpx.get(head, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert httpx.get(head, headers={"If-None-Match": '"other"'}).status_code == 200
    lines = [("If-None-Match", '"other"'), ("If-None-Match", tag)]
    assert httpx.get(head, headers=lines).status_code == 304


@pytest.mark.parametrize("token", ["", " ", "two words", "line\nbreak", "schlüssel"])
def test_a_token_that_no_request_could_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token must"):
        create_app(FakeEngine(), token=token)
