"""The teacher client against a real server, and its checks of arguments and answers."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from serving_cases import (
    VOCAB,
    assert_equals_forward_pass,
    client_of_responses,
    direct_logprobs,
    one_position,
    random_sequences,
)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [0, 1, 7, VOCAB])
def test_answers_equal_a_direct_forward_pass(url: str, model: Any, k: int, temperature: float) -> None:
    sequences, prompts = random_sequences(9)
    with TeacherClient(url, request_tokens=30) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, top_logprobs=k, temperature=temperature)
    assert_equals_forward_pass(answer, model, sequences, prompts, k, temperature)


def test_score_ids_get_their_log_probabilities(url: str, model: Any) -> None:
    sequences, prompts = random_sequences(5)
    generator = np.random.default_rng(1)
    counts = [max(len(s) - max(p, 1), 0) for s, p in zip(sequences, prompts, strict=True)]
    ids = [generator.integers(0, VOCAB, (count, 3)).tolist() for count in counts]
    with TeacherClient(url, request_tokens=20) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, score_ids=ids)
    chosen = torch.tensor([row for sequence_ids in ids for row in sequence_ids])
    want = direct_logprobs(model, sequences, prompts).gather(-1, chosen)
    assert answer.score_logprobs is not None
    np.testing.assert_allclose(answer.score_logprobs, want.numpy(), atol=2e-5)


def test_vocab_size_normalises_over_the_first_tokens_only(url: str, model: Any) -> None:
    generator = np.random.default_rng(2)
    sequences = [generator.integers(0, 20, 9).tolist() for _ in range(3)]
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, [2, 3, 4], top_logprobs=20, vocab_size=20)
    assert_equals_forward_pass(answer, model, sequences, [2, 3, 4], 20, 1.0, vocab_size=20)


@pytest.mark.parametrize("sequences", [[[3]], [[3, 4]]])
def test_a_request_without_positions_gets_an_empty_answer(url: str, sequences: list[list[int]]) -> None:
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, [len(sequences[0])], top_logprobs=4)
    assert answer.lengths.tolist() == [0]


def test_score_ids_may_leave_a_part_without_positions(url: str) -> None:
    with TeacherClient(url, request_tokens=3) as client:
        answer = client.get_sequence_logprobs([[1, 2, 3], [5]], [1, 1], score_ids=[[[1], [2]], []])
    assert answer.score_logprobs is not None
    assert answer.score_logprobs.shape == (2, 1)


def test_a_call_with_many_sequences_is_divided_into_requests(url: str) -> None:
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs([[1, 2, 3]] * 600, [2] * 600)
    assert answer.lengths.tolist() == [1] * 600


def test_numpy_arguments_are_accepted(url: str) -> None:
    with TeacherClient(url) as client:
        plain = client.get_sequence_logprobs([[1, 2, 3]], [1], score_ids=[[[4, 5], [6, 7]]])
        same = client.get_sequence_logprobs(
            np.array([[1, 2, 3]]), np.array([1]), score_ids=[np.array([[4, 5], [6, 7]])]
        )
    np.testing.assert_array_equal(same.score_logprobs, plain.score_logprobs)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (one_position(actual=np.nan), "no number for sequence 0 at token 1"),
        (one_position(logprob=np.nan), "no number for sequence 0 at token 1"),
        (one_position(logprob=-np.inf), "no number for sequence 0 at token 1"),
    ],
)
def test_a_missing_number_is_an_error_that_names_the_position(response: httpx.Response, message: str) -> None:
    client, _ = client_of_responses(response)
    with pytest.raises(TeacherError, match=message):
        client.get_sequence_logprobs([[1, 2]], [1])


def test_an_answer_that_does_not_fit_the_request_is_an_error() -> None:
    client, _ = client_of_responses(one_position())
    with pytest.raises(TeacherError, match=r"\[1\] positions, expected \[2\]"):
        client.get_sequence_logprobs([[1, 2, 3]], [1])
    with pytest.raises(TeacherError, match=r"\(1, None\) log-probabilities .*, expected \(3, None\)"):
        client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=3)
