"""The teacher client: sequences in, arrays out, whatever happens on the way."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from . import wire
from .openai_protocol import openai_answer, openai_request
from .wire import Answer

Protocol = Literal["auto", "fused-distill", "openai"]
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class TeacherError(RuntimeError):
    """The teacher gave no usable answer; the message says what it said."""


@dataclass(frozen=True)
class RetryPolicy:
    """How a request is repeated: it is idempotent, so repeating it is safe."""

    attempts: int = 6
    first_wait_seconds: float = 0.25  # doubled at every attempt, half of it random
    longest_wait_seconds: float = 8.0


class TeacherClient:
    """A client of one teacher behind one or more servers.

    Args:
        url: a server, or several that serve the same teacher; a failing one is passed over for the next.
        token: bearer token.
        protocol: "fused-distill", "openai" (a stock vLLM server's /v1/completions with prompt_logprobs), or
            "auto": asked of the first server that answers.
        model: the model's name, for "openai" only. None: the first that the server lists.
        timeout_seconds: of one attempt.
        deadline_seconds: of one call of `get_sequence_logprobs`, all attempts together.
        concurrency: requests under way at once.
        request_tokens: tokens of one request; a call is cut into as many as that takes.
        retries: see RetryPolicy.

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
        timeout_seconds: float = 120.0,
        deadline_seconds: float = 600.0,
        concurrency: int = 4,
        request_tokens: int = 8192,
        retries: RetryPolicy | None = None,
    ):
        self.urls = [u.rstrip("/") for u in ([url] if isinstance(url, str) else url)]
        if not self.urls:
            raise ValueError("url must name at least one server, got none")
        for name, value in (("concurrency", concurrency), ("request_tokens", request_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if protocol not in ("auto", "fused-distill", "openai"):
            raise ValueError(f"protocol must be 'auto', 'fused-distill' or 'openai', got {protocol!r}")
        self.retries = retries or RetryPolicy()
        self.deadline_seconds, self.request_tokens = deadline_seconds, request_tokens
        self._protocol: Protocol = protocol
        self._model = model
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(headers=headers, timeout=timeout_seconds)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="teacher-client")
        self._preferred = 0  # the server that answered last

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up connections and threads."""
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def info(self) -> dict[str, Any]:
        """What the server says of itself: /v1/teacher, or for "openai" the first of /v1/models."""
        deadline = time.monotonic() + self.deadline_seconds
        if self.protocol == "openai":
            return self._send("GET", "/v1/models", deadline).json()["data"][0]
        return self._send("GET", "/v1/teacher", deadline).json()

    @property
    def protocol(self) -> Protocol:
        """What the servers speak, found out at the first use."""
        if self._protocol == "auto":
            deadline = time.monotonic() + self.deadline_seconds
            found = self._send("GET", "/v1/teacher", deadline, accepted=(200, 404))
            self._protocol = "fused-distill" if found.status_code == 200 else "openai"
        return self._protocol

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        *,
        top_logprobs: int = 1,
        temperature: float = 1.0,
        score_ids: Sequence[Sequence[Sequence[int]]] | None = None,
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
            TeacherError: no server gave a whole answer before the deadline, or one refused the request.
        """
        _check(sequences, prompt_lengths, score_ids)
        if self.protocol == "openai":
            if temperature != 1:
                raise ValueError(
                    "temperature must be 1 with a stock vLLM server, which ignores it for prompt "
                    f"log-probabilities, got {temperature}"
                )
            if score_ids is not None:
                raise ValueError(
                    "score_ids must be None with a stock vLLM server, which scores its own top tokens only"
                )
        deadline = time.monotonic() + self.deadline_seconds
        futures = [
            self._pool.submit(
                self._score, sequences, prompt_lengths, part, top_logprobs, temperature, score_ids, deadline
            )
            for part in _parts(sequences, self.request_tokens)
        ]
        try:
            answers = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return Answer.join(answers)

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        part: range,
        top_logprobs: int,
        temperature: float,
        score_ids: Sequence[Sequence[Sequence[int]]] | None,
        deadline: float,
    ) -> Answer:
        tokens = [list(sequences[i]) for i in part]
        prompts = [prompt_lengths[i] for i in part]
        if self.protocol == "openai":
            body = openai_request(self._openai_model(), tokens, top_logprobs)
            answer = openai_answer(
                self._send("POST", "/v1/completions", deadline, body).json(), tokens, prompts, top_logprobs
            )
        else:
            body = {
                "sequences": tokens,
                "prompt_lengths": prompts,
                "top_logprobs": top_logprobs,
                "temperature": temperature,
                "score_ids": None if score_ids is None else [score_ids[i] for i in part],
                "response_format": "binary",
            }
            answer = wire.decode_binary(self._send("POST", "/get_sequence_logprobs/", deadline, body).content)
        _check_answer(answer, tokens, prompts, top_logprobs, part.start)
        return answer

    def _openai_model(self) -> str:
        if self._model is None:
            self._model = self.info()["id"]
        return self._model

    def _send(
        self,
        method: str,
        path: str,
        deadline: float,
        body: object = None,
        accepted: tuple[int, ...] = (200,),
    ) -> httpx.Response:
        """The first good response of any server; repeats what may succeed later."""
        problem = "no attempt was made"
        for attempt in range(self.retries.attempts):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            index = (self._preferred + attempt) % len(self.urls)
            wait = self._backoff(attempt)
            try:
                timeout = httpx.Timeout(min(left, self._http.timeout.read or left))
                response = self._http.request(method, self.urls[index] + path, json=body, timeout=timeout)
            except httpx.TransportError as error:
                problem = f"{self.urls[index]}: {type(error).__name__}: {error}"
            else:
                if response.status_code in accepted:
                    self._preferred = index
                    return response
                problem = f"{self.urls[index]}: {response.status_code} {_detail(response)}"
                if response.status_code not in _RETRIED:
                    raise TeacherError(problem)
                asked = response.headers.get("retry-after", "")
                wait = max(wait, float(asked)) if asked.isdigit() else wait
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
        raise TeacherError(f"no answer after {self.retries.attempts} attempts or the deadline: {problem}")

    def _backoff(self, attempt: int) -> float:
        longest = min(self.retries.longest_wait_seconds, self.retries.first_wait_seconds * 2**attempt)
        return longest * random.uniform(0.5, 1.0)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json().get("detail", response.text[:500]))
    except ValueError:
        return response.text[:500]


def _check(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    score_ids: Sequence[Sequence[Sequence[int]]] | None,
) -> None:
    if not sequences:
        raise ValueError("sequences must not be empty")
    if len(prompt_lengths) != len(sequences):
        raise ValueError(
            f"prompt_lengths must be {len(sequences)}, one a sequence, got {len(prompt_lengths)}"
        )
    if score_ids is not None and len(score_ids) != len(sequences):
        raise ValueError(f"score_ids must be {len(sequences)}, one a sequence, got {len(score_ids)}")
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if len(tokens) < 1:
            raise ValueError(f"sequences[{i}] must have at least one token")
        if not 0 <= prompt_length <= len(tokens):
            raise ValueError(
                f"prompt_lengths[{i}] must be between 0 and the sequence's {len(tokens)} tokens, "
                f"got {prompt_length}"
            )


def _parts(sequences: Sequence[Sequence[int]], most_tokens: int) -> list[range]:
    """Consecutive sequences of about most_tokens each; a longer sequence goes alone."""
    parts: list[range] = []
    start = tokens = 0
    for i, sequence in enumerate(sequences):
        if i > start and tokens + len(sequence) > most_tokens:
            parts.append(range(start, i))
            start, tokens = i, 0
        tokens += len(sequence)
    parts.append(range(start, len(sequences)))
    return parts


def _check_answer(
    answer: Answer, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, first: int
) -> None:
    """The answer covers what was asked, without a missing number."""
    starts = [max(p, 1) for p in prompt_lengths]
    expected = [max(len(s) - start, 0) for s, start in zip(sequences, starts, strict=True)]
    if answer.lengths.tolist() != expected:
        raise TeacherError(f"the answer has {answer.lengths.tolist()} positions, expected {expected}")
    if answer.logprobs.shape[1] != top_logprobs:
        raise TeacherError(
            f"the answer has {answer.logprobs.shape[1]} log-probabilities a position, expected {top_logprobs}"
        )
    at = 0
    for i, (part, start) in enumerate(zip(answer.split(), starts, strict=True)):
        missing = ~np.isfinite(part.actual_logprobs) | np.isnan(part.logprobs).any(-1)
        if top_logprobs:
            missing |= part.logprobs[:, 0] == -np.inf
        if missing.any():
            position = start + int(missing.argmax())
            raise TeacherError(f"the answer has no number for sequence {first + i} at token {position}")
        at += len(part.actual_logprobs)
