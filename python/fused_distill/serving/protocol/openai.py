"""A stock vLLM server's /v1/completions with prompt_logprobs, as a teacher."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from .logprobs import TeacherLogprobs, first_scored


def first_model(response: httpx.Response) -> dict[str, Any]:
    """The first entry of /v1/models."""
    return dict(response.json()["data"][0])


def openai_request(model: str, sequences: list[list[int]], top_logprobs: int) -> dict[str, Any]:
    """The body that makes vLLM score prompts and generate nothing worth having."""
    return {
        "model": model,
        "prompt": sequences,
        "max_tokens": 1,  # vLLM's least
        "temperature": 0.0,
        "prompt_logprobs": top_logprobs,
        "return_tokens_as_token_ids": True,
    }


def openai_answer(
    content: dict[str, Any], sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int
) -> TeacherLogprobs:
    """vLLM's answer as ours; a number that is not there becomes NaN, for the client to complain about.

    Each position is {token id: {"logprob", "rank", ...}} of the top_logprobs most likely tokens and of the
    actual one, whatever its rank.
    """
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    lengths: list[int] = []
    logprobs: list[list[float]] = []
    ids: list[list[int]] = []
    actual: list[float] = []
    for tokens, prompt_length, choice in zip(sequences, prompt_lengths, choices, strict=True):
        start = first_scored(prompt_length)
        positions = (choice.get("prompt_logprobs") or [])[start:]
        lengths.append(len(positions))
        for token, position in zip(tokens[start:], positions, strict=False):
            found = {int(key): entry for key, entry in (position or {}).items()}
            ranked = [
                (e["rank"], key) for key, e in found.items() if (e.get("rank") or np.inf) <= top_logprobs
            ]
            best = [(key, found[key]) for _, key in sorted(ranked)][:top_logprobs]
            absent = top_logprobs - len(best)
            logprobs.append([_number(entry) for _, entry in best] + [np.nan] * absent)
            ids.append([key for key, _ in best] + [0] * absent)
            actual.append(_number(found.get(token, {})))
    return TeacherLogprobs(
        np.array(lengths, dtype=np.int64),
        np.array(logprobs, dtype=np.float32).reshape(len(actual), top_logprobs),
        np.array(ids, dtype=np.int32).reshape(len(actual), top_logprobs),
        np.array(actual, dtype=np.float32),
    )


def _number(entry: dict[str, Any]) -> float:
    value = entry.get("logprob")
    return np.nan if value is None else float(value)
