"""Teacher log-probabilities from the prompt_logprobs of a stock vLLM server's /v1/completions."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .logprobs import TeacherLogprobs
from .request import first_scored_index

_VLLM_MINUS_INFINITY = -9999.0  # vLLM's replacement in JSON


def forbidden_as_infinite(logprobs: ArrayLike) -> NDArray[np.float32]:
    """Return vLLM's log-probabilities with -inf where vLLM writes -9999.0, for tokens of probability 0."""
    values = np.asarray(logprobs, dtype=np.float32)
    return np.where(values == _VLLM_MINUS_INFINITY, -np.inf, values).astype(np.float32)


def first_model(response: httpx.Response) -> dict[str, Any]:
    """Return the first entry of a response of /v1/models.

    Raises:
        ValueError: the first entry has no id.
    """
    model = dict(response.json()["data"][0])
    if not isinstance(model.get("id"), str):
        raise ValueError(f"/v1/models must give an id of the first model, got {model.get('id')!r:.100}")
    return model


def openai_request(model: str, sequences: list[list[int]], top_logprobs: int) -> dict[str, Any]:
    """Return a request body that scores prompts. vLLM generates at least one token, which is discarded."""
    return {
        "model": model,
        "prompt": sequences,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": top_logprobs,
        "return_tokens_as_token_ids": True,
    }


def openai_answer(
    content: dict[str, Any], sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int
) -> TeacherLogprobs:
    """Convert vLLM's response. A missing number becomes NaN, which the client reports with its position.

    vLLM gives each position as {token id: {"logprob", "rank", ...}}, with the top_logprobs most likely tokens
    and the actual token, whatever its rank. It replaces -inf, see `forbidden_as_infinite`.
    """
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    lengths: list[int] = []
    logprobs: list[list[float]] = []
    ids: list[list[int]] = []
    actual: list[float] = []
    for tokens, prompt_length, choice in zip(sequences, prompt_lengths, choices, strict=True):
        start = first_scored_index(prompt_length)
        positions: list[dict[str, dict[str, Any]] | None] = (choice.get("prompt_logprobs") or [])[start:]
        lengths.append(len(positions))
        for token, position in zip(tokens[start:], positions, strict=False):
            entries = {int(key): entry for key, entry in (position or {}).items()}
            ranks: dict[int, float] = {key: entry.get("rank") or np.inf for key, entry in entries.items()}
            top = sorted((key for key in ranks if ranks[key] <= top_logprobs), key=lambda key: ranks[key])
            n_absent = top_logprobs - len(top[:top_logprobs])
            logprobs.append([_logprob(entries[key]) for key in top[:top_logprobs]] + [np.nan] * n_absent)
            ids.append(top[:top_logprobs] + [0] * n_absent)
            actual.append(_logprob(entries.get(token, {})))
    return TeacherLogprobs(
        np.array(lengths, dtype=np.int64),
        forbidden_as_infinite(logprobs).reshape(len(actual), top_logprobs),
        np.array(ids, dtype=np.int32).reshape(len(actual), top_logprobs),
        forbidden_as_infinite(actual),
    )


def _logprob(entry: dict[str, Any]) -> float:
    value = entry.get("logprob")
    return np.nan if value is None else float(value)
