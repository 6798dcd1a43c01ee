"""The teacher client: sequences in, arrays out, whatever happens on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, TypeVar

import httpx
from numpy.typing import NDArray

from ...huggingface.lm_head import LMHeadParams
from ..protocol import logprobs as wire
from ..protocol.hidden_states import HiddenDtype, HiddenStates, decode_hidden
from ..protocol.lm_head import file_sha256, load_head
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.openai import first_model, openai_answer, openai_request
from ..protocol.packing import WireError
from .request import Ids, ScoringRequest, TeacherError
from .retry import RetryingClient, RetryPolicy

Protocol = Literal["auto", "fused-distill", "openai"]
T = TypeVar("T")


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
        self._head_sha256: str | None = None  # of the head that head() gave
        self._gives_hidden: dict[str, Any] | None = None  # what a server that gives hidden states said
        self._http = RetryingClient(
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
        return self._teacher(deadline)

    def head(self, cache: Path | None = None) -> LMHeadParams:
        """The teacher's head, on the CPU; downloaded once and kept by its checksum.

        Args:
            cache: folder to keep it in. None: fused-distill under $XDG_CACHE_HOME or ~/.cache.

        Raises:
            ServerError: no server gave it, say for want of the capability "hidden_states".
        """
        deadline = time.monotonic() + self.deadline_seconds
        self._hidden_info(deadline)
        sha256 = self._http.send("HEAD", wire.HEAD_PATH, deadline, _etag)
        folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
        path = folder / f"head-{sha256}.safetensors"
        if not path.exists() or file_sha256(path) != sha256:
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, delete=False) as file:
                partial = Path(file.name)

                def whole(_: httpx.Response) -> None:
                    file.flush()
                    if file_sha256(partial) != sha256:
                        raise ValueError("the head is not the one that its checksum names")

                try:
                    self._http.send("GET", wire.HEAD_PATH, deadline, whole, file=file.file)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        self._head_sha256 = sha256
        return load_head(path)

    def get_hidden_states(
        self,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        *,
        dtype: HiddenDtype = "bfloat16",
    ) -> HiddenStates:
        """The teacher's last hidden states at every completion position, for the exact loss with `head()`.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: tokens of each sequence that are its prompt.
            dtype: of the answer.

        Returns:
            `HiddenStates` in the order of the sequences; `align_hidden_states` puts them where the loss wants
            them.

        Raises:
            ValueError: an argument that does not fit, by name and index.
            ServerError: as `get_sequence_logprobs`; TeacherError also where they belong to another head than
                `head()` gave.
        """
        asked = ScoringRequest.of(sequences, prompt_lengths, 0, 1.0, None, None, self.deadline_seconds)
        info = self._hidden_info(asked.deadline)
        most = info["limits"]["numbers"] // info["hidden_size"]
        found = self._in_parts(asked, lambda part, first: self._states(part, first, dtype), most)
        try:
            return HiddenStates.join(found)
        except WireError as error:
            raise TeacherError(str(error)) from None

    def _hidden_info(self, deadline: float) -> dict[str, Any]:
        """What the server says of itself, asked once, if it gives hidden states."""
        if self._detected(deadline) == "openai":
            raise ValueError("hidden states cannot be asked of a stock vLLM server")
        if self._gives_hidden is None:
            info = self._teacher(deadline)
            if "hidden_states" not in info["capabilities"]:
                raise TeacherError(f"this teacher's engine has no hidden_states, only {info['capabilities']}")
            self._gives_hidden = info
        return self._gives_hidden

    def _teacher(self, deadline: float) -> dict[str, Any]:
        return self._http.send("GET", "/v1/teacher", deadline, lambda response: dict(response.json()))

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        *,
        top_logprobs: int = 1,
        temperature: float = 1.0,
        score_ids: Sequence[Sequence[Ids] | NDArray[Any]] | NDArray[Any] | None = None,
        vocab_size: int | None = None,
    ) -> TeacherLogprobs:
        """The teacher's log-probabilities at every completion position.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: tokens of each sequence that are its prompt.
            top_logprobs: K, the most likely tokens of each position; 0 for none.
            temperature: > 0, divides the teacher's logits; 1 only with protocol "openai".
            score_ids: per sequence and position M tokens whose log-probabilities are wanted as well; not with
                protocol "openai".
            vocab_size: the distribution is over the first vocab_size tokens, those that a student with a
                shorter head knows; not with protocol "openai". None: over all rows of the teacher's head.

        Returns:
            An `TeacherLogprobs` in the order of the sequences; see `wire` for which positions there are.

        Raises:
            ValueError: an argument that does not fit, by name and index.
            ServerError: no server gave a whole answer before the deadline, or one refused the request;
                TeacherError, a kind of it: one answered another question, or without a number.
        """
        asked = ScoringRequest.of(
            sequences,
            prompt_lengths,
            top_logprobs,
            temperature,
            score_ids,
            vocab_size,
            self.deadline_seconds,
        )
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
            if vocab_size is not None:
                raise ValueError("vocab_size must be None with a stock vLLM server, which knows its own only")
        return TeacherLogprobs.join(self._in_parts(asked, self._score))

    def _in_parts(
        self, asked: ScoringRequest, call: Callable[[ScoringRequest, int], T], most_tokens: int | None = None
    ) -> list[T]:
        parts = asked.parts(min(self.request_tokens, most_tokens or self.request_tokens))
        futures = [self._pool.submit(call, asked.part(part), part.start) for part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _states(self, asked: ScoringRequest, first: int, dtype: HiddenDtype) -> HiddenStates:
        body = {
            "sequences": asked.sequences,
            "prompt_lengths": asked.prompt_lengths,
            "response": "hidden_states",
            "response_format": "binary",
            "dtype": dtype,
        }
        hidden = self._http.send(
            "POST", wire.SCORE_PATH, asked.deadline, lambda r: decode_hidden(r.content), body
        )
        asked.check_hidden_states(hidden, first)
        if self._head_sha256 not in (None, hidden.head_sha256):
            raise TeacherError("hidden states are of another head than head() gave")
        return hidden

    def _score(self, asked: ScoringRequest, first: int) -> TeacherLogprobs:
        def checked(answer: TeacherLogprobs) -> TeacherLogprobs:
            asked.check_answer(answer, first)
            return answer

        if self._protocol == "openai":
            model = self._model or self._http.send("GET", "/v1/models", asked.deadline, first_model)["id"]
            body = openai_request(model, asked.sequences, asked.top_logprobs)

            def decode(response: httpx.Response) -> TeacherLogprobs:
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
            "vocab_size": asked.vocab_size,
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


def _etag(response: httpx.Response) -> str:
    sha256 = response.headers["etag"].removeprefix("W/").strip('"')
    if len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"the head's checksum must have 64 hexadecimal digits, got {sha256!r}")
    return sha256
