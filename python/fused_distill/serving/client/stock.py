"""Scoring by a stock inference server: its limits, and that all its answers come from the same weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import httpx

from ..protocol.logprobs import TeacherLogprobs
from ..protocol.openai import first_model
from .identity import SameLogprobs, server_of
from .request import ScoringRequest, TeacherError
from .retry import RetryingClient


class StockServer(ABC):
    """Send scoring requests to a server that lists its models in /v1/models. Threads may share it.

    Args:
        http: sends the requests.
        model: model name. None: the first that the server lists.
    """

    name: ClassVar[str]
    path: ClassVar[str]  # of scoring requests
    title: ClassVar[str]  # in error messages
    scored: ClassVar[str]  # what the server calls the log-probabilities that are asked for
    scores_ids: ClassVar[bool]  # takes the tokens to score

    def __init__(self, http: RetryingClient, model: str | None):
        self._http, self._model = http, model
        self._description: dict[str, Any] | None = None
        self._same_weights = SameLogprobs()

    def check_options(self, request: ScoringRequest) -> None:
        """Raise a ValueError if the request has options that the server lacks."""
        server = f"with {self.title}, which"
        if request.temperature != 1:
            reason = f"ignores it for {self.scored}, got {request.temperature}"
            raise ValueError(f"temperature must be 1 {server} {reason}")
        if request.score_ids is not None and not self.scores_ids:
            raise ValueError(f"score_ids must be None {server} scores its own top tokens only")
        if request.vocab_size is not None:
            raise ValueError(f"vocab_size must be None {server} scores over its own vocabulary")

    @abstractmethod
    def longest(self, deadline: float) -> tuple[int | None, str]:
        """Return the number of tokens of the longest sequence that the server takes, and why."""

    @abstractmethod
    def body(self, asked: ScoringRequest, deadline: float) -> tuple[dict[str, Any], int]:
        """Return the body of a request, and the largest size of its answer in bytes."""

    @abstractmethod
    def read(self, content: Any, asked: ScoringRequest) -> TeacherLogprobs:
        """Convert an answer. A missing number becomes NaN."""

    @abstractmethod
    def advice(self, refusal: str, asked: ScoringRequest) -> str:
        """Return what to change on the server after a refusal with the given reason, or nothing."""

    def parts_tokens(self, request: ScoringRequest, max_tokens: int) -> int:
        """Return how many tokens one request may have."""
        return max_tokens

    def description(self, deadline: float) -> dict[str, Any]:
        """Return the model's entry in /v1/models, requested once.

        Raises:
            TeacherError: the server has no model of this name.
        """
        description = self._description
        if description is None:
            entry = self._http.send_one("GET", "/v1/models", deadline, self._entry)
            description = self._description = entry | self.details(deadline)
        return description

    def details(self, deadline: float) -> dict[str, Any]:
        """Return what the description has beyond the entry in /v1/models."""
        return {}

    def check_length(self, name: str, tokens: int, deadline: float) -> None:
        """Raise a ValueError if a sequence is too long for the server."""
        longest, reason = self.longest(deadline)
        if longest is not None and tokens > longest:
            raise ValueError(
                f"{name} must have at most {longest} tokens, got {tokens}: {reason}. {self.restart(tokens)}"
            )

    @abstractmethod
    def restart(self, tokens: int) -> str:
        """Return how to start the server for sequences of so many tokens."""

    def check(self, request: ScoringRequest, deadline: float) -> None:
        """Raise a ValueError if the server lacks an option of the request, or takes no sequence so long."""
        self.check_options(request)
        for i, tokens in enumerate(request.sequences):
            self.check_length(f"sequences[{i}]", len(tokens), deadline)

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
        width = part.score_count
        asked = replace(
            part,
            sequences=[*part.sequences, probe],
            prompt_lengths=[*part.prompt_lengths, 0],
            score_ids=part.score_ids and [*part.score_ids, [probe[:1] * width] * (len(probe) - 1)],
        )
        server, answer = self._ask(asked, deadline)
        *answers, probed = answer.split()
        if len(probed.actual_logprobs) == len(probe) - 1:  # else the server left out positions
            self._same_weights.check(server, probed.actual_logprobs)
        return TeacherLogprobs.join(answers)

    def _ask(self, asked: ScoringRequest, deadline: float) -> tuple[str, TeacherLogprobs]:
        """Return the server that answered, and its answer."""

        def decode(response: httpx.Response) -> tuple[str, TeacherLogprobs]:
            server = server_of(response)
            if response.status_code == 400:
                reason = _refusal(response)
                raise TeacherError(f"{server}: 400 {reason}{self.advice(reason, asked)}")
            return server, self.read(response.json(), asked)

        body, max_bytes = self.body(asked, deadline)
        return self._http.send(
            "POST", self.path, deadline, decode, body, accepted=(200, 400), max_bytes=max_bytes
        )

    def _entry(self, response: httpx.Response) -> dict[str, Any]:
        if self._model is None:
            return first_model(response)
        models = [dict(entry) for entry in response.json()["data"]]
        for entry in models:
            if entry["id"] == self._model:
                return entry
        names = [entry["id"] for entry in models]
        raise TeacherError(f"{server_of(response)} has no model {self._model!r}, only {names}")


def _refusal(response: httpx.Response) -> str:
    """Return the reason that a server gives for status 400."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:500]
