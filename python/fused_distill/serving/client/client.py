"""The teacher client, with retries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, TypeVar

import httpx
from numpy.typing import NDArray

from ...huggingface.lm_head import LMHeadParams
from ..protocol.hidden_states import HiddenDtype, HiddenStates, decode_hidden
from ..protocol.lm_head import file_sha256, load_head
from ..protocol.logprobs import TeacherLogprobs, decode_binary
from ..protocol.openai import first_model
from ..protocol.packing import WireError
from ..protocol.request import HEAD_PATH, SCORE_PATH
from .identity import SameFingerprint
from .request import Ids, ScoreIds, ScoringRequest, TeacherError
from .retry import RetryingClient, RetryPolicy
from .stock_vllm import StockVllm

Protocol = Literal["auto", "fused-distill", "openai"]
T = TypeVar("T")


class TeacherClient(AbstractContextManager["TeacherClient"]):
    """Client of one teacher behind one or more servers. Threads may share a client.

    Args:
        url: one server, or several that serve the same teacher; when one fails, the next is tried.
        token: bearer token.
        protocol: "fused-distill", "openai" (a stock vLLM server's /v1/completions with prompt_logprobs), or
            "auto" to detect which of them the server speaks.
        model: model name for "openai". None: the first that the server lists.
        timeout_seconds: limit between two bytes of one attempt; longer than the server's own limit of 300 s.
        deadline_seconds: limit of one call, all attempts together.
        concurrency: number of requests in flight.
        request_tokens: tokens per request; longer calls are divided into several requests.
        retries: see RetryPolicy.
        transport: httpx transport, for tests and proxies.

    Raises:
        ValueError: an argument is invalid (the message names it).

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
        self._head_sha256: str | None = None  # checksum of the head that head() returned
        self._hidden_info: dict[str, Any] | None = None  # /v1/teacher of a server with hidden states
        self._http = RetryingClient(
            url, token=token, timeout_seconds=timeout_seconds, retries=retries, transport=transport
        )
        self._stock_vllm = StockVllm(self._http, model)
        self._same_weights = SameFingerprint()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="teacher-client")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and threads; a pending call fails."""
        self._http.closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def info(self) -> dict[str, Any]:
        """Return the server's description: /v1/teacher, or with "openai" the first entry of /v1/models."""
        deadline = time.monotonic() + self.deadline_seconds
        if self._detect_protocol(deadline) == "openai":
            return self._stock_vllm.description(deadline)
        return self._http.send("GET", "/v1/teacher", deadline, lambda r: dict(r.json()))

    def check_limits(self, *, top_logprobs: int, length: int) -> None:
        """Check, before a run, that a server takes its requests.

        Args:
            top_logprobs: the largest K that will be asked for.
            length: tokens of the longest sequence that will be sent.

        Raises:
            ValueError: the server takes no sequence of that length, or not so many tokens per position.
            ServerError: as `get_sequence_logprobs`. With a stock vLLM server this is how a K above its
                --max-logprobs is reported.
        """
        deadline = time.monotonic() + self.deadline_seconds
        if self._detect_protocol(deadline) == "openai":
            self._stock_vllm.check_limits(top_logprobs, length, deadline)
            return
        info = self.info()
        for name, value, most in (
            ("top_logprobs", top_logprobs, info["limits"]["top_logprobs"]),
            ("length", length, info["max_length"]),
        ):
            if value > most:
                raise ValueError(f"{name} must be at most {most}, this server's limit, got {value}")

    def head(self, cache: Path | None = None) -> LMHeadParams:
        """Return the teacher's LM head on the CPU. It is downloaded once and cached by its checksum.

        Args:
            cache: cache folder. None: fused-distill under $XDG_CACHE_HOME or ~/.cache.

        Raises:
            ServerError: no server gave the head, e.g. because it lacks the capability "hidden_states".
        """
        deadline = time.monotonic() + self.deadline_seconds
        self._require_hidden_states(deadline)
        sha256 = self._http.send("HEAD", HEAD_PATH, deadline, _etag)
        folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
        path = folder / f"head-{sha256}.safetensors"
        if not path.exists() or file_sha256(path) != sha256:  # missing or damaged
            self._download_head(path, sha256, deadline)
        head, self._head_sha256 = load_head(path), sha256
        return head

    def get_hidden_states(
        self,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        *,
        dtype: HiddenDtype = "bfloat16",
    ) -> HiddenStates:
        """Return the teacher's last hidden states at every completion position, for the loss with `head()`.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: number of prompt tokens of each sequence.
            dtype: dtype of the response.

        Returns:
            `HiddenStates` in the order of the sequences, for `align_hidden_states`.

        Raises:
            ValueError: an argument is invalid (the message names it and the index).
            ServerError: as `get_sequence_logprobs`; TeacherError also if the hidden states belong to another
                head than `head()` returned.
        """
        request = ScoringRequest.create(sequences, prompt_lengths)
        deadline = time.monotonic() + self.deadline_seconds
        info = self._require_hidden_states(deadline)

        def send(part: ScoringRequest, first: int) -> HiddenStates:
            body = {
                "sequences": part.sequences,
                "prompt_lengths": part.prompt_lengths,
                "response": "hidden_states",
                "response_format": "binary",
                "dtype": dtype,
            }
            decode = self._same_weights.then(lambda r: decode_hidden(r.content))
            hidden = self._http.send("POST", SCORE_PATH, deadline, decode, body)
            part.check_hidden_states(hidden, first)
            if self._head_sha256 not in (None, hidden.head_sha256):
                raise TeacherError("the hidden states belong to another head than head() returned")
            return hidden

        parts = self._send_parts(request, send, info["limits"]["numbers"] // info["hidden_size"])
        try:
            return HiddenStates.join(parts)
        except WireError as error:
            raise TeacherError(str(error)) from None

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        *,
        top_logprobs: int = 1,
        temperature: float = 1.0,
        score_ids: ScoreIds | None = None,
        vocab_size: int | None = None,
    ) -> TeacherLogprobs:
        """Return the teacher's log-probabilities at every completion position.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: number of prompt tokens of each sequence.
            top_logprobs: K, the number of most likely tokens per position; 0 for none.
            temperature: > 0, divides the teacher's logits; must be 1 with protocol "openai".
            score_ids: M further tokens per sequence and position to score; not with protocol "openai".
            vocab_size: number of tokens, from the first, that the distribution is over, for a student with a
                shorter LM head; not with protocol "openai". None: all rows of the teacher's head.

        Returns:
            `TeacherLogprobs` in the order of the sequences, one position per token after the prompt.

        Raises:
            ValueError: an argument is invalid (the message names it and the index).
            ServerError: no server gave a valid response before the deadline, or one refused the request.
            TeacherError: a kind of ServerError; the response does not fit the request or lacks a number.
        """
        request = ScoringRequest.create(
            sequences, prompt_lengths, top_logprobs, temperature, score_ids, vocab_size
        )
        deadline = time.monotonic() + self.deadline_seconds
        openai = self._detect_protocol(deadline) == "openai"
        if openai:
            server = "with a stock vLLM server, which"
            if temperature != 1:
                reason = f"ignores it for prompt log-probabilities, got {temperature}"
                raise ValueError(f"temperature must be 1 {server} {reason}")
            if score_ids is not None:
                raise ValueError(f"score_ids must be None {server} scores its own top tokens only")
            if vocab_size is not None:
                raise ValueError(f"vocab_size must be None {server} scores over its own vocabulary")
            for i, tokens in enumerate(request.sequences):
                self._stock_vllm.check_length(f"sequences[{i}]", len(tokens), deadline)

        def send(part: ScoringRequest, first: int) -> TeacherLogprobs:
            if openai:
                answer = self._stock_vllm.score(part, deadline)
            else:
                body = {**vars(part), "response_format": "binary"}
                decode = self._same_weights.then(lambda r: decode_binary(r.content))
                answer = self._http.send("POST", SCORE_PATH, deadline, decode, body)
            part.check_answer(answer, first)
            return answer

        return TeacherLogprobs.join(self._send_parts(request, send, self.request_tokens))

    def _send_parts(
        self, request: ScoringRequest, send: Callable[[ScoringRequest, int], T], max_tokens: int
    ) -> list[T]:
        parts = request.parts(min(self.request_tokens, max_tokens))
        futures = [self._pool.submit(send, part, first) for first, part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _download_head(self, path: Path, sha256: str, deadline: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = Path(file.name)

            def check(_: httpx.Response) -> None:
                file.flush()
                if file_sha256(partial) != sha256:
                    raise ValueError("the downloaded head does not match its checksum")

            try:
                self._http.send("GET", HEAD_PATH, deadline, check, file=file.file)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _detect_protocol(self, deadline: float) -> Protocol:
        """Detect the servers' protocol on first use."""
        if self._protocol == "auto":
            status = self._http.send(
                "GET", "/v1/teacher", deadline, lambda r: r.status_code, accepted=(200, 404)
            )
            if status == 404:
                self._http.send("GET", "/v1/models", deadline, first_model)  # a 404 alone may be a gateway's
            self._protocol = "fused-distill" if status == 200 else "openai"
        return self._protocol

    def _require_hidden_states(self, deadline: float) -> dict[str, Any]:
        """Return the server's description, requested once, if it gives hidden states."""
        if self._detect_protocol(deadline) == "openai":
            raise ValueError("a stock vLLM server gives no hidden states")
        if self._hidden_info is None:
            info = self._http.send("GET", "/v1/teacher", deadline, lambda r: dict(r.json()))
            if "hidden_states" not in info["capabilities"]:
                raise TeacherError(f"this teacher's engine has no hidden_states, only {info['capabilities']}")
            self._hidden_info = info
        return self._hidden_info


def _etag(response: httpx.Response) -> str:
    sha256 = response.headers["etag"].removeprefix("W/").strip('"')
    if len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"the head's checksum must have 64 hexadecimal digits, got {sha256!r}")
    return sha256
