"""Validation of request bodies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fused_distill.serving.server.validation import RequestError, ServerLimits, parse_request
from serving_cases import (
    FULL_BODY,
    LENGTH,
    VALID_BODY,
    VOCAB,
    FakeEngine,
    client_of_responses,
    one_position,
    post,
    serving,
)

INVALID_FIELDS = [
    ("sequences", {"sequences": []}),
    ("sequences", {"sequences": [["a"]]}),
    ("sequences.0.0", {"sequences": [[-1]]}),
    (r"sequences\[0\]", {"sequences": [[]], "prompt_lengths": [0]}),
    (r"sequences\[0\]", {"sequences": [[VOCAB]]}),
    (r"sequences\[1\]", {"sequences": [[1], [1] * (LENGTH + 1)], "prompt_lengths": [0, 0]}),
    ("prompt_lengths", {"prompt_lengths": [1, 1]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [4]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [-1]}),
    ("top_logprobs", {"top_logprobs": VOCAB + 1}),
    ("top_logprobs", {"top_logprobs": -1}),
    ("temperature", {"temperature": 0}),
    ("response_format", {"response_format": "xml"}),
    ("score_ids", {"score_ids": [[[1]], [[1]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1]]]}),
    ("score_ids", {"score_ids": [[[1], [1, 2]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1], [VOCAB]]]}),
    ("unknown", {"unknown": 1}),
    ("vocab_size", {"vocab_size": 0}),
    ("vocab_size", {"vocab_size": VOCAB + 1}),
    (r"sequences\[0\]", {"vocab_size": 3}),
    ("top_logprobs", {"vocab_size": 5, "top_logprobs": 6}),
    (r"score_ids\[0\]", {"vocab_size": 5, "score_ids": [[[1], [5]]]}),
    ("sequences.0.0", {"sequences": [[True]]}),
    ("prompt_lengths.0", {"prompt_lengths": ["1"]}),
    ("temperature", {"temperature": 1e-9}),
]


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_temperature_that_is_not_finite_is_refused(number: str) -> None:
    body = f'{{"sequences": [[1, 2]], "prompt_lengths": [1], "temperature": {number}}}'
    with pytest.raises(RequestError, match="temperature: Input should be a finite number"):
        parse_request(body.encode(), FakeEngine(), ServerLimits())


@pytest.mark.parametrize(
    ("name", "change"), INVALID_FIELDS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(INVALID_FIELDS)]
)
def test_an_invalid_field_is_named(url: str, name: str, change: dict[str, Any]) -> None:
    response = post(url, **{**VALID_BODY, **change})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(name.replace("\\", ""))


GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[1, 2",
    b"null",
    b"[" * 10**5,
    b'{"sequences": [[' + b"9" * 5000 + b"]]}",
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_bodies_are_refused(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{url}/get_sequence_logprobs/", content=body, headers=headers)
    assert response.status_code == 422
    assert len(response.content) < 1000
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_full_of_errors_gets_a_short_answer(url: str) -> None:
    response = post(url, sequences=[[-1] * 10**5], prompt_lengths=[0])
    assert response.status_code == 422
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("response_format", {"response_format": "json"}),
        ("temperature", {"temperature": 1.0}),
        ("top_logprobs", {"top_logprobs": 4}),
        ("score_ids", {"score_ids": [[[1], [2]]]}),
        ("dtype", {"dtype": "float16"}),
    ],
)
def test_options_that_hidden_states_do_not_have_are_named(
    url: str, name: str, change: dict[str, Any]
) -> None:
    body = {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "response": "hidden_states"}
    response = post(url, **{**body, "response_format": "binary", **change})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(name)


@pytest.mark.parametrize(
    ("capability", "value"), [("temperature", 0.5), ("score_ids", [[[1]]]), ("vocab_size", 5)]
)
def test_an_engine_without_a_capability_refuses_what_needs_it(capability: str, value: Any) -> None:
    engine = FakeEngine()
    engine.info = engine.info._replace(capabilities=())
    with serving(engine) as served:
        response = post(served.url, sequences=[[1, 2]], prompt_lengths=[1], **{capability: value})
    assert response.status_code == 422
    assert capability in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {**FULL_BODY, "score_ids": [[0] * 1000, []]},
            id="score_ids",
        ),
        pytest.param(
            {**FULL_BODY, **{f"field {i}": 0 for i in range(1000)}},
            id="unknown fields",
        ),
        pytest.param({**FULL_BODY, "sequences": [[-1] * 1000]}, id="sequences"),
        pytest.param({**FULL_BODY, "prompt_lengths": [""] * 1000}, id="prompt_lengths"),
        pytest.param({**FULL_BODY, "score_ids": [[[""] * 1000], []]}, id="ids of a position"),
    ],
)
def test_a_body_full_of_errors_makes_one_error(body: dict[str, Any]) -> None:
    # An error takes about 800 bytes while the request is looked at: 64 MB of them take 25 GB.
    with pytest.raises(RequestError) as refused:
        parse_request(json.dumps(body).encode(), FakeEngine(), ServerLimits())
    cause: Any = refused.value.__context__
    assert cause is None or cause.error_count() <= 2


@pytest.mark.parametrize(
    "body",
    [{**FULL_BODY, "x" * 10**5: 1}, {**FULL_BODY, "prompt_lengths": [10**4000, 1]}],
    ids=["long name", "long number"],
)
def test_an_error_message_is_short(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request(json.dumps(body).encode(), FakeEngine(), ServerLimits())
    assert len(refused.value.response.body) < 1000


@pytest.mark.parametrize(
    ("prompt_lengths", "message"),
    [
        ([1, 4, 0], "prompt_lengths[1] must be between 0 and the sequence's 3 tokens, got 4"),
        ([1, 3, -1], "prompt_lengths[2] must be between 0 and the sequence's 1 tokens, got -1"),
        ([1, 3], "prompt_lengths must have 3 entries, one per sequence, got 2"),
    ],
    ids=["too long", "negative", "too few"],
)
def test_client_and_server_check_prompt_lengths_and_name_the_index(
    prompt_lengths: list[int], message: str
) -> None:
    sequences = [[1, 2], [3, 4, 5], [6]]
    client, seen = client_of_responses(one_position())
    with pytest.raises(ValueError, match=r"^prompt_lengths") as refused:
        client.get_sequence_logprobs(sequences, prompt_lengths)
    assert str(refused.value) == message
    assert not seen
    engine = FakeEngine()
    with serving(engine) as served:
        response = post(served.url, sequences=sequences, prompt_lengths=prompt_lengths)
    assert (response.status_code, response.json()["detail"]) == (422, message)
    assert not engine.batches
