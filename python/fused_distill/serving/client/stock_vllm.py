"""Scoring by a stock vLLM server: its limits, and the check that all answers come from the same weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import httpx

from ..protocol.logprobs import TeacherLogprobs
from ..protocol.openai import first_model, openai_answer, openai_request
from .identity import SameLogprobs, server_of
from .request import ScoringRequest, TeacherError
from .retry import RetryingClient


class StockVllm:
    """Send scoring requests to a stock vLLM server. Threads may share it.

    Args:
        http: sends the requests.
        model: model name. None: the first that the server lists.
    """

    def __init__(self, http: RetryingClient, model: str | None):
        self._http, self._name = http, model
        self._description: dict[str, Any] | None = None  # the model's entry in /v1/models
        self._same_weights = SameLogprobs()

    def description(self, deadline: float) -> dict[str, Any]:
        """Return the model's entry in /v1/models, requested once.

        Raises:
            TeacherError: the server has no model of this name.
        """
        description = self._description
        if description is None:
            description = self._http.send_one("GET", "/v1/models", deadline, self._entry)
            self._description = description
        return description

    def check_length(self, name: str, tokens: int, deadline: float) -> None:
        """Raise a ValueError if a sequence is too long for the server, which always generates one token."""
        longest = self.description(deadline).get("max_model_len")
        if longest is not None and tokens >= longest:
            raise ValueError(
                f"{name} must have at most {longest - 1} tokens, got {tokens}: the vLLM server's "
                f"--max-model-len {longest} includes one token that it generates. {_restart(tokens)}"
            )

    def check_limits(self, top_logprobs: int, length: int, deadline: float) -> None:
        """See `TeacherClient.check_limits`."""
        self.check_length("a sequence", length, deadline)
        request = ScoringRequest.create([[0, 0]], [0], top_logprobs)
        self._http.run([partial(self._ask, request, deadline)])

    def score(self, part: ScoringRequest, deadline: float) -> TeacherLogprobs:
        """Return the answer to one request.

        A few tokens are scored with it, by which weights are recognized.

        Raises:
            TeacherError: the server's limits are too low (the message names the option to change), or its
                weights differ from those of the first answer.
        """
        probe = self._same_weights.tokens(part.sequences[0])
        asked = replace(
            part, sequences=[*part.sequences, probe], prompt_lengths=[*part.prompt_lengths, 0], score_ids=None
        )
        server, answer = self._ask(asked, deadline)
        *answers, probed = answer.split()
        if len(probed.actual_logprobs) == len(probe) - 1:  # else the server left out positions
            self._same_weights.check(server, probed.actual_logprobs)
        return TeacherLogprobs.join(answers)

    def _ask(self, asked: ScoringRequest, deadline: float) -> tuple[str, TeacherLogprobs]:
        """Return the server that answered, and its answer."""

        def decode(response: httpx.Response) -> tuple[str, TeacherLogprobs]:
            if response.status_code == 400:
                raise TeacherError(_refusal(response, asked))
            fields = asked.sequences, asked.prompt_lengths, asked.top_logprobs
            return server_of(response), openai_answer(response.json(), *fields)

        body = openai_request(self.description(deadline)["id"], asked.sequences, asked.top_logprobs)
        return self._http.send(
            "POST",
            "/v1/completions",
            deadline,
            decode,
            body,
            accepted=(200, 400),
            max_bytes=asked.openai_bytes,
        )

    def _entry(self, response: httpx.Response) -> dict[str, Any]:
        if self._name is None:
            return first_model(response)
        models = [dict(entry) for entry in response.json()["data"]]
        for entry in models:
            if entry["id"] == self._name:
                return entry
        names = [entry["id"] for entry in models]
        raise TeacherError(f"{server_of(response)} has no model {self._name!r}, only {names}")


def _refusal(response: httpx.Response, asked: ScoringRequest) -> str:
    """Return vLLM's reason for status 400, and which of its options to change."""
    try:
        reason = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        reason = response.text[:500]
    advice = ""
    if "logprobs" in reason and "max allowed" in reason:
        advice = f". Start vLLM with --max-logprobs {asked.top_logprobs} or more"
    elif "maximum context length" in reason or "max_tokens must be at least 1" in reason:
        advice = f". {_restart(max(map(len, asked.sequences)))}"
    return f"{server_of(response)}: 400 {reason}{advice}"


def _restart(tokens: int) -> str:
    return f"Start vLLM with --max-model-len {tokens + 1} or more"
