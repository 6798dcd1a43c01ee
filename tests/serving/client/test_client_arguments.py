"""Invalid arguments of every public method: an error that names the argument, before any request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import RetryPolicy
from raw_server import RawServer, stuck
from serving_cases import VALID_BODY, client_of_responses, one_position

Change = dict[str, Any]

NOT_WHOLE: list[Any] = [1.5, 1.0, None, "1", True, [1], float("nan"), np.float64(1.0), torch.tensor(1.0)]
NOT_POSITIVE: list[Any] = [0, -1.0, float("nan"), float("inf"), None, "1", True, [1.0], torch.ones(2)]
NOT_A_LIST: list[Any] = [None, 5, 1.5, "abc", b"abc", {1: 2}, {1, 2}, np.array(5), torch.tensor(5)]

SEQUENCES: list[tuple[str, Change]] = [
    *((r"sequences", {"sequences": value}) for value in NOT_A_LIST),
    *((r"sequences\[0\]", {"sequences": [value]}) for value in NOT_A_LIST),
    (r"sequences\[0\]", {"sequences": [1, 2, 3]}),
    (r"sequences\[0\]", {"sequences": np.array([1, 2, 3])}),
    (r"sequences\[0\]", {"sequences": torch.tensor([1, 2, 3])}),
    *((r"sequences\[0\]\[2\]", {"sequences": [[1, 2, value]]}) for value in NOT_WHOLE),
    (r"sequences\[0\]\[0\]", {"sequences": np.array([[1.0, 2.0, 3.0]])}),
    (r"sequences\[0\]\[0\]", {"sequences": torch.ones(1, 3)}),
    (r"sequences\[0\]\[1\]", {"sequences": [[1, -1, 3]]}),
    (r"sequences\[0\]\[1\]", {"sequences": [[1, 2**31, 3]]}),
    (r"sequences", {"sequences": []}),
    (r"sequences\[0\]", {"sequences": [[]], "prompt_lengths": [0]}),
    *((r"prompt_lengths", {"prompt_lengths": value}) for value in NOT_A_LIST),
    *((r"prompt_lengths\[0\]", {"prompt_lengths": [value]}) for value in NOT_WHOLE),
    (r"prompt_lengths\[0\]", {"prompt_lengths": np.array([1.0])}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [-1]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [4]}),
    (r"prompt_lengths", {"prompt_lengths": [1, 1]}),
]
OPTIONS: list[tuple[str, Change]] = [
    *((r"top_logprobs", {"top_logprobs": value}) for value in (*NOT_WHOLE, -1)),
    *((r"temperature", {"temperature": value}) for value in NOT_POSITIVE),
    *((r"vocab_size", {"vocab_size": value}) for value in (*NOT_WHOLE, 0, -1) if value is not None),
    *((r"score_ids", {"score_ids": value}) for value in NOT_A_LIST if value is not None),
    *((r"score_ids\[0\]", {"score_ids": [value]}) for value in NOT_A_LIST),
    *((r"score_ids\[0\]\[0\]", {"score_ids": [[value, [1]]]}) for value in NOT_A_LIST),
    *((r"score_ids\[0\]\[1\]\[0\]", {"score_ids": [[[1], [value]]]}) for value in NOT_WHOLE),
    (r"score_ids\[0\]\[0\]\[0\]", {"score_ids": [[[-1], [1]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1], [1, 2]]]}),
    (r"score_ids", {"score_ids": []}),
]
URLS: list[Any] = [None, 5, "", [], [None], "host:8000", "ftp://host", "http://", "http://a b"]
CONSTRUCTOR: list[tuple[str, Change]] = [
    *(("url", {"url": value}) for value in (*URLS, "http://h:99999", "http://h:x")),
    *(("token", {"token": value}) for value in ("", " ", "a\n", "a\r\nX: y", "a\x00", "schlüssel", 5, b"a")),
    *(("concurrency", {"concurrency": value}) for value in (*NOT_WHOLE, 0)),
    *(("request_tokens", {"request_tokens": value}) for value in (*NOT_WHOLE, 0)),
    *(("timeout_seconds", {"timeout_seconds": value}) for value in NOT_POSITIVE),
    *(("deadline_seconds", {"deadline_seconds": value}) for value in NOT_POSITIVE),
    *(("protocol", {"protocol": value}) for value in (None, "", "http", ["auto"])),
    *(("model", {"model": value}) for value in ("", 5, ["m"])),
    *(("retries", {"retries": value}) for value in (5, "many", {})),
]
POLICY: list[tuple[str, Change]] = [
    *(("attempts", {"attempts": value}) for value in (*NOT_WHOLE, 0) if value is not None),
    *(("wrong_answers", {"wrong_answers": value}) for value in (*NOT_WHOLE, 0)),
    *(("first_wait_seconds", {"first_wait_seconds": value}) for value in NOT_POSITIVE),
    *(("longest_wait_seconds", {"longest_wait_seconds": value}) for value in NOT_POSITIVE),
]


def named(cases: list[tuple[str, Change]]) -> Any:
    ids = [f"{name}-{i}" for i, (name, _) in enumerate(cases)]
    return pytest.mark.parametrize(("name", "change"), cases, ids=ids)


@named(SEQUENCES + OPTIONS)
def test_an_invalid_argument_of_log_probabilities_is_named(name: str, change: Change) -> None:
    client, requests = client_of_responses(one_position())
    with pytest.raises(ValueError, match=f"^{name} must"):
        client.get_sequence_logprobs(**{**VALID_BODY, **change})
    assert not requests


@named([*SEQUENCES, *(("dtype", {"dtype": value}) for value in (None, "float16", "", 5, torch.float32))])
def test_an_invalid_argument_of_hidden_states_is_named(name: str, change: Change) -> None:
    client, requests = client_of_responses(one_position())
    with pytest.raises(ValueError, match=f"^{name} must"):
        client.get_hidden_states(**{**VALID_BODY, **change})
    assert not requests


def test_arguments_are_checked_before_the_first_contact() -> None:
    with RawServer(stuck, describes=False) as server, TeacherClient(server.url) as client:
        with pytest.raises(ValueError, match=r"^sequences"):
            client.get_sequence_logprobs([1, 2], [1])  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"^sequences"):
            client.get_hidden_states([1, 2], [1])  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"^cache must be a folder"):
            client.head(__file__)
        with pytest.raises(ValueError, match=r"^cache must be a folder"):
            client.head(Path(__file__))
        with pytest.raises(ValueError, match=r"^cache must be a folder"):
            client.head(5)  # pyright: ignore[reportArgumentType]
        for timeout in NOT_POSITIVE:
            if timeout is not None:
                with pytest.raises(ValueError, match=r"^timeout must"):
                    client.wait_until_ready(timeout)
        assert not server.connections


@named(CONSTRUCTOR)
def test_an_invalid_argument_of_the_client_is_named(name: str, change: Change) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        TeacherClient(**{"url": "http://teacher", **change})


@named(POLICY)
def test_an_invalid_argument_of_the_policy_is_named(name: str, change: Change) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        RetryPolicy(**change)


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "http://teacher", "token": "s3cret\n"},
        {"url": "http://user:s3cret@teacher:99999"},
        {"url": "http://user:s3cret@a b"},
        {"url": "ftp://user:s3cret@teacher"},
    ],
    ids=range(4),
)
def test_an_error_does_not_repeat_a_secret(arguments: Change) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        TeacherClient(**arguments)
    assert "s3cret" not in str(caught.value)


WHOLE = [1, np.int64(1), np.uint8(1), torch.tensor(1)]


@pytest.mark.parametrize("one", WHOLE, ids=range(len(WHOLE)))
def test_whole_numbers_of_any_library_are_accepted(one: Any) -> None:
    client, requests = client_of_responses(one_position())
    client.get_sequence_logprobs([[one, one]], [one], top_logprobs=one, vocab_size=9)
    plain, same = client_of_responses(one_position())
    plain.get_sequence_logprobs([[1, 1]], [1], top_logprobs=1, vocab_size=9)
    assert requests[0].content == same[0].content


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda rows: map(iter, rows)])
def test_sequences_of_any_kind_are_accepted(kind: Any) -> None:
    client, requests = client_of_responses(one_position())
    client.get_sequence_logprobs(kind([[1, 2]]), [1])
    assert b'"sequences":[[1,2]]' in requests[0].content
