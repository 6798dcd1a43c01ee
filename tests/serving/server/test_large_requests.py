"""Large JSON bodies and answers: the same results, bounded work, and a server that answers meanwhile."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.protocol.request import ScoringOptions
from fused_distill.serving.server import json_body
from fused_distill.serving.server.validation import RequestError, ServerLimits, parse_request
from limits import seconds
from serving_cases import FULL_BODY, FakeEngine, in_background, post, serving

SCORED: dict[str, Any] = {**FULL_BODY, "score_ids": [[[7, 8], [9, 10]], [[11, 12]]]}


def parsed(body: bytes) -> tuple[list[Any], ScoringOptions]:
    _, sequences, options = parse_request(body, FakeEngine(), ServerLimits())
    return [(s.tokens, s.prompt_length, np.array(s.score_ids).tolist()) for s in sequences], options


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read small bodies as large ones are read."""
    monkeypatch.setattr(json_body, "WHOLE_BYTES", 0)


@pytest.mark.parametrize("body", [FULL_BODY, SCORED, {**SCORED, "sequences": [[1, 2, 3], [4, 5]]}])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_body_in_pieces_gives_what_the_whole_gives(
    body: dict[str, Any], indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps(body, indent=indent).encode()
    whole = parsed(content)
    monkeypatch.setattr(json_body, "WHOLE_BYTES", 0)
    assert parsed(content) == whole


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sequences": [[1, 2, 3], [4, -5]]}, "sequences.1.1: Input should be greater than or equal to 0"),
        ({"sequences": [[1, 2, 3], [4, 2**31]]}, "sequences.1.1: Input should be less than"),
        ({"sequences": [[1, 2, 3], [1.5, 2]]}, "sequences.1.0: Input should be a valid integer"),
        ({"sequences": [[1, 2, 3], 5]}, "sequences.1: Input should be a valid array"),
        ({"sequences": [1, 2]}, "sequences: Input should be a valid array"),
        ({"prompt_lengths": [1, 9]}, "prompt_lengths[1] must be between"),
        ({"temperature": [1, 2]}, "temperature"),
        ({"other": [1, 2]}, "other: unknown field"),
    ],
)
def test_errors_of_a_body_in_pieces_name_the_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(json.dumps({**FULL_BODY, **change}).encode())
    assert str(refused.value).startswith(reason)


@pytest.mark.usefixtures("in_pieces")
def test_a_client_cannot_refer_to_a_list_by_a_number() -> None:
    content = json.dumps(FULL_BODY).encode()
    firsts = {json_body.take_id_lists(content, 9, 9)[1].first for _ in range(9)}
    assert len(firsts) > 1  # a number that leaks says nothing about the next body's


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_lengths": [1, [1]]}, "prompt_lengths.1: Input should be a valid integer"),
        ({"top_logprobs": [1]}, "top_logprobs: Input should be a valid integer"),
        ({"[1]": 0}, "body: unknown field"),
        ({"dtype": "[1]"}, "dtype"),
    ],
)
def test_no_error_shows_the_number_of_a_list(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(json.dumps({**FULL_BODY, **change}).encode())
    assert str(refused.value).startswith(reason)
    assert "-1" not in str(refused.value)


@pytest.mark.parametrize("limits", [ServerLimits(numbers=10), ServerLimits(score_ids=1)])
def test_a_request_beyond_the_limits_is_refused_before_its_score_ids_are_joined(
    limits: ServerLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the score ids were joined")

    monkeypatch.setattr("fused_distill.serving.server.validation.replace", fail)
    with pytest.raises(RequestError, match="must be at most"):
        parse_request(json.dumps(SCORED).encode(), FakeEngine(), limits)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"sequences":[' + b"[]," * (6 << 20) + b"[]]}", "lists"),
        (b'{"sequences":[[' + b"1," * (6 << 20) + b"1]]}", "ids in a list"),
        (b'{"sequences":[[' + b"-1," * (6 << 20) + b"1]]}", "bytes besides"),
        (b"[" * (18 << 20), "lists"),
        (b'{"' + b"a" * (18 << 20) + b'":1}', "bytes besides"),
    ],
    ids=["empty lists", "one list", "negative ids", "brackets", "a name"],
)
def test_a_large_body_that_cannot_be_valid_is_refused_before_it_is_parsed(
    body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the body was parsed")

    monkeypatch.setattr("fused_distill.serving.server.validation.RequestBody.model_validate_json", fail)
    with pytest.raises(RequestError, match=reason) as refused:
        parse_request(body, FakeEngine(), ServerLimits())
    assert refused.value.response.status_code == 422


def test_a_json_answer_has_a_limit_of_its_own() -> None:
    limits = ServerLimits(json_numbers=5)
    with serving(FakeEngine(), limits=limits) as served:
        assert httpx.get(f"{served.url}/v1/teacher").json()["limits"]["json_numbers"] == 5
        body = {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "top_logprobs": 2}
        refused = post(served.url, **body)
        assert refused.status_code == 422
        assert "'binary'" in refused.json()["detail"]
        assert post(served.url, **body, response_format="binary").status_code == 200
        assert post(served.url, **{**body, "top_logprobs": 1}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"sequences": [[5] * 1000] * 4, "top_logprobs": 500}, id="answer"),
        pytest.param(
            {"sequences": [[5] * 1000] * 4, "top_logprobs": 0, "score_ids": [[[123] * 250] * 999] * 4},
            id="body",
        ),
    ],
)
def test_health_answers_while_large_json_is_read_or_written(body: dict[str, Any]) -> None:
    with serving(FakeEngine()) as served, httpx.Client(base_url=served.url, timeout=seconds(60)) as http:
        http.get("/health")
        done = threading.Event()

        def ask(_: int) -> int:
            try:
                return post(served.url, **body, prompt_lengths=[1] * 4).status_code
            finally:
                done.set()

        answered = 0
        with in_background(1, ask) as futures:
            while not done.is_set():
                assert http.get("/health").status_code == 200
                answered += not done.is_set()
        assert futures[0].result() == 200
    assert answered > 0


def test_the_client_divides_top_k_requests_within_the_limit_of_an_answer() -> None:
    engine = FakeEngine()
    with serving(engine, limits=ServerLimits(numbers=100)) as served, TeacherClient(served.url) as client:
        answer = client.get_sequence_logprobs([[1, 2, 3, 4]] * 9, [1] * 9, top_logprobs=9)
    assert answer.lengths.tolist() == [3] * 9
