"""Teacher log-probabilities from the input log-probabilities of an SGLang server's /generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .logprobs import TeacherLogprobs
from .request import first_scored_index

Scores = Sequence[Sequence[Sequence[int]]]


def distinct_ids(sequences: list[list[int]], score_ids: Scores) -> list[list[int]]:
    """Return each sequence's different score ids, because SGLang scores the same ids at all its positions."""
    return [
        sorted({token for ids in rows for token in ids}) or tokens[:1]  # SGLang expects at least one
        for tokens, rows in zip(sequences, score_ids, strict=False)
    ]


def sglang_request(
    sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, score_ids: Scores | None
) -> dict[str, Any]:
    """Return a request body that scores the completions and generates nothing.

    SGLang's answer begins at the token `logprob_start_len`, whose own log-probability it leaves out. It
    computes from that token on, however much of the sequence is in its prefix cache. At least one likely
    token is asked for, which tells a forbidden token from a failed computation.
    """
    body: dict[str, Any] = {
        "input_ids": sequences,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": [first_scored_index(length) - 1 for length in prompt_lengths],
        "top_logprobs_num": max(top_logprobs, 1),
    }
    if score_ids is not None:
        body["token_ids_logprob"] = distinct_ids(sequences, score_ids)
    return body


def sglang_abort(content: list[dict[str, Any]]) -> str | None:
    """Return why SGLang ended a request before it was computed, or None."""
    for answer in content:
        reason = answer["meta_info"].get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            return str(reason.get("message"))
    return None


def sglang_answer(
    content: list[dict[str, Any]], top_logprobs: int, score_ids: Scores | None
) -> TeacherLogprobs:
    """Convert SGLang's response. A missing number becomes NaN, which the client reports with its position.

    Each position has a triple (log-probability, token id, text) for the actual token and lists of triples for
    the likely and the chosen ones. SGLang writes both -inf and NaN as null.
    """
    lengths: list[int] = []
    actual: list[float] = []
    logprobs: list[list[float]] = []
    ids: list[list[int]] = []
    scores: list[list[float]] = []
    width = len(next((row for rows in score_ids or [] for row in rows), []))
    k = max(top_logprobs, 1)
    for i, answer in enumerate(content):
        info = answer["meta_info"]
        tokens = info["input_token_logprobs"][1:]
        lengths.append(len(tokens))
        actual.extend(_number(entry) for entry in tokens)
        for _, likely in zip(tokens, info["input_top_logprobs"][1:], strict=True):
            if likely is None or len(likely) != k:
                likely = [(None, 0)] * k
            logprobs.append([_number(entry) for entry in likely])
            ids.append([int(entry[1]) for entry in likely])
        if score_ids is not None:
            given = info["input_token_ids_logprobs"][1:]
            for row, chosen in zip(score_ids[i], given, strict=True):
                known = {int(entry[1]): _number(entry) for entry in chosen or []}
                scores.append([known[token] for token in row])
    top = np.array(logprobs, np.float32).reshape(len(actual), k)
    computed = ~np.isnan(top[:, :1])
    return TeacherLogprobs(
        np.array(lengths, np.int64),
        _forbidden(top, computed)[:, :top_logprobs],
        np.array(ids, np.int32).reshape(len(actual), k)[:, :top_logprobs],
        _forbidden(np.array(actual, np.float32)[:, None], computed)[:, 0],
        None
        if score_ids is None
        else _forbidden(np.array(scores, np.float32).reshape(len(actual), width), computed),
    )


def _number(entry: Sequence[Any]) -> float:
    return np.nan if entry[0] is None else float(entry[0])


def _forbidden(values: NDArray[np.float32], computed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return numbers (P, N) with -inf for null, where the position's (P, 1) likeliest token has a number."""
    return np.where(np.isnan(values) & computed, np.float32(-np.inf), values)
