"""The teacher client: sequences in, arrays out, whatever happens on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np
from numpy.typing import NDArray

from . import wire
from .openai_protocol import first_model, openai_answer, openai_request
from .patient_http import PatientHttp, RetryPolicy, ServerError
from .wire import Answer

Protocol = Literal["auto", "fused-distill", "openai"]
Ids = Sequence[int] | NDArray[Any]  # of integers

_REQUEST_SEQUENCES = 256
_SCORE_IDS_PER_TOKEN = 16  # so many score ids weigh as much as a token when a call is cut into requests


class TeacherError(ServerError):
    """A teacher's answer that is not one to the question asked."""


@dataclass(frozen=True)
class _Asked:
    """One call of get_sequence_logprobs."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    top_logprobs: int
    temperature: float
    score_ids: list[list[list[int]]] | None
    deadline: float

    @property
    def starts(self) -> list[int]:
        return [wire.first_scored(p) for p in self.prompt_lengths]

    @property
    def positions(self) -> list[int]:
        lengths = zip(self.sequences, self.prompt_lengths, strict=True)
        return [wire.scored_positions(len(tokens), prompt_length) for tokens, prompt_length in lengths]

    @property
    def score_count(self) -> int:
        rows = itertools.chain.from_iterable(self.score_ids or [])
        return len(next(rows, []))

    def part(self, indices: range) -> _Asked:
        scores = None if self.score_ids is None else [self.score_ids[i] for i in indices]
        sequences = [self.sequences[i] for i in indices]
        prompts = [self.prompt_lengths[i] for i in indices]
        return _Asked(sequences, prompts, self.top_logprobs, self.temperature, scores, self.deadline)


class TeacherClient:
    """A client of one teacher behind one or more servers. Threads may share it.

    Args:
        url: a server, or several that serve the same teacher; a failing one is passed over for the next.
        token: bearer token.
        protocol: "fused-distill", "openai" (a stock vLLM server's /v1/completions with prompt_logprobs), or
            "auto": asked of the first server that answers.
        model: the model's name, for "openai" only. None: the first that the server lists.
        timeout_seconds: between two bytes of one attempt; longer than the server's own limit of 300 s.
        deadline_seconds: of one call, all attempts together.
        concurrency: requests under way at once.
        request_tokens: tokens of one request; a call is cut into as many as that takes.
        retries: see RetryPolicy.
        transport: of httpx, for tests and proxies.

    Raises:
        ValueError: an argument that does not fit, by name.

    Example:
        >>> with TeacherClient("http://127.0.0.1:8000") as teacher:
        ...     answer = teacher.get_sequence_logprobs([[1, 2, 3, 4]], [2], top_logprobs=16)
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        protocol: Protocol = "auto",
        model: str | None = None,
        timeout_seconds: float = 330.0,
        deadline_seconds: float = 1200.0,
        concurrency: int = 4,
        request_tokens: int = 8192,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        for name, value in (("concurrency", concurrency), ("request_tokens", request_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if protocol not in ("auto", "fused-distill", "openai"):
            raise ValueError(f"protocol must be 'auto', 'fused-distill' or 'openai', got {protocol!r}")
        self.deadline_seconds, self.request_tokens = deadline_seconds, request_tokens
        self._protocol: Protocol = protocol
        self._model = model
        self._http = PatientHttp(
            url, token=token, timeout_seconds=timeout_seconds, retries=retries, transport=transport
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="teacher-client")

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up connections and threads; a call under way fails."""
        self._http.stop_waiting()
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def info(self) -> dict[str, Any]:
        """What the server says of itself: /v1/teacher, or for "openai" the first of /v1/models."""
        deadline = time.monotonic() + self.deadline_seconds
        if self._detected(deadline) == "openai":
            return self._http.send("GET", "/v1/models", deadline, first_model)
        return self._http.send("GET", "/v1/teacher", deadline, lambda response: dict(response.json()))

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        *,
        top_logprobs: int = 1,
        temperature: float = 1.0,
        score_ids: Sequence[Sequence[Ids] | NDArray[Any]] | NDArray[Any] | None = None,
    ) -> Answer:
        """The teacher's log-probabilities at every completion position.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: tokens of each sequence that are its prompt.
            top_logprobs: K, the most likely tokens of each position; 0 for none.
            temperature: > 0, divides the teacher's logits; 1 only with protocol "openai".
            score_ids: per sequence and position M tokens whose log-probabilities are wanted as well; not with
                protocol "openai".

        Returns:
            An `Answer` in the order of the sequences; see `wire` for which positions there are.

        Raises:
            ValueError: an argument that does not fit, by name and index.
            ServerError: no server gave a whole answer before the deadline, or one refused the request;
                TeacherError, a kind of it: one answered another question, or without a number.
        """
        asked = _Asked(
            [[int(t) for t in s] for s in sequences],
            [int(p) for p in prompt_lengths],
            int(top_logprobs),
            float(temperature),
            None
            if score_ids is None
            else [[[int(t) for t in position] for position in own] for own in score_ids],
            time.monotonic() + self.deadline_seconds,
        )
        _check(asked)
        if self._detected(asked.deadline) == "openai":
            if temperature != 1:
                raise ValueError(
                    "temperature must be 1 with a stock vLLM server, which ignores it for prompt "
                    f"log-probabilities, got {temperature}"
                )
            if score_ids is not None:
                raise ValueError(
                    "score_ids must be None with a stock vLLM server, which scores its own top tokens only"
                )
        parts = _parts(asked, self.request_tokens)
        futures = [self._pool.submit(self._score, asked.part(part), part.start) for part in parts]
        try:
            return Answer.join([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def _score(self, asked: _Asked, first: int) -> Answer:
        def checked(answer: Answer) -> Answer:
            _check_answer(answer, asked, first)
            return answer

        if self._protocol == "openai":
            model = self._model or self._http.send("GET", "/v1/models", asked.deadline, first_model)["id"]
            body = openai_request(model, asked.sequences, asked.top_logprobs)

            def decode(response: httpx.Response) -> Answer:
                return openai_answer(
                    response.json(), asked.sequences, asked.prompt_lengths, asked.top_logprobs
                )

            return checked(self._http.send("POST", "/v1/completions", asked.deadline, decode, body))
        body = {
            "sequences": asked.sequences,
            "prompt_lengths": asked.prompt_lengths,
            "top_logprobs": asked.top_logprobs,
            "temperature": asked.temperature,
            "score_ids": asked.score_ids,
            "response_format": "binary",
        }
        return checked(
            self._http.send(
                "POST",
                wire.SCORE_PATH,
                asked.deadline,
                lambda r: wire.decode_binary(r.content),
                body,
            )
        )

    def _detected(self, deadline: float) -> Protocol:
        """What the servers speak, found out at the first use."""
        if self._protocol == "auto":
            found = self._http.send(
                "GET", "/v1/teacher", deadline, lambda r: r.status_code, accepted=(200, 404)
            )
            if found == 404:
                self._http.send("GET", "/v1/models", deadline, first_model)  # a 404 alone may be a gateway's
            self._protocol = "fused-distill" if found == 200 else "openai"
        return self._protocol


def _check(asked: _Asked) -> None:
    if not asked.sequences:
        raise ValueError("sequences must not be empty")
    wire.check_request(asked.sequences, asked.prompt_lengths, asked.score_ids)
    if asked.top_logprobs < 0:
        raise ValueError(f"top_logprobs must not be negative, got {asked.top_logprobs}")
    if not asked.temperature > 0:
        raise ValueError(f"temperature must be positive, got {asked.temperature}")
    for i, tokens in enumerate(asked.sequences):
        if len(tokens) < 1:
            raise ValueError(f"sequences[{i}] must have at least one token, got none")
    if asked.score_ids is None:
        return
    for i, (own, positions) in enumerate(zip(asked.score_ids, asked.positions, strict=True)):
        if len(own) != positions or any(len(ids) != asked.score_count for ids in own):
            raise ValueError(
                f"score_ids[{i}] must have {positions} positions of {asked.score_count} ids, "
                f"got {len(own)} of {sorted({len(ids) for ids in own})}"
            )


def _parts(asked: _Asked, most_tokens: int) -> list[range]:
    """Consecutive sequences of about most_tokens each; a longer sequence goes alone."""
    weight = 1 + asked.score_count / _SCORE_IDS_PER_TOKEN
    parts: list[range] = []
    start, tokens = 0, 0.0
    for i, sequence in enumerate(asked.sequences):
        full = tokens + weight * len(sequence) > most_tokens or i - start >= _REQUEST_SEQUENCES
        if i > start and full:
            parts.append(range(start, i))
            start, tokens = i, 0.0
        tokens += weight * len(sequence)
    parts.append(range(start, len(asked.sequences)))
    return parts


def _check_answer(answer: Answer, asked: _Asked, first: int) -> None:
    """The answer covers what was asked, without a missing number."""
    if answer.lengths.tolist() != asked.positions:
        raise TeacherError(f"the answer has {answer.lengths.tolist()} positions, expected {asked.positions}")
    scores = answer.score_logprobs
    widths = (answer.logprobs.shape[1], None if scores is None else scores.shape[1])
    expected = (asked.top_logprobs, None if asked.score_ids is None else asked.score_count)
    if len(answer.actual_logprobs) and widths != expected:
        raise TeacherError(f"the answer has {widths} log-probabilities a position, expected {expected}")
    for i, (part, start) in enumerate(zip(answer.split(), asked.starts, strict=True)):
        missing = ~np.isfinite(part.actual_logprobs) | np.isnan(part.logprobs).any(-1)
        if asked.top_logprobs:
            missing |= part.logprobs[:, 0] == -np.inf
        if part.score_logprobs is not None:
            missing |= np.isnan(part.score_logprobs).any(-1)
        if missing.any():
            position = start + int(missing.argmax())
            raise TeacherError(f"the answer has no number for sequence {first + i} at token {position}")
