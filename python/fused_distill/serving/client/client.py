"""The teacher client, with retries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, TypeVar, get_args

import httpx
from numpy.typing import NDArray

from ...huggingface.lm_head import LMHeadParams
from ..protocol.hidden_states import HiddenDtype, HiddenStates, decode_hidden
from ..protocol.lm_head import file_sha256, load_head
from ..protocol.logprobs import TeacherLogprobs, decode_binary
from ..protocol.openai import first_model
from ..protocol.packing import WireError
from ..protocol.request import HEAD_PATH, SCORE_PATH
from .arguments import cache_folder, positive_number, whole_number
from .description import check_head, check_limits, head_bytes, teacher_description
from .identity import SameFingerprint
from .request import Ids, ScoreIds, ScoringRequest, TeacherError
from .retry import RetryingClient, RetryPolicy
from .stock import StockServer
from .stock_sglang import StockSglang
from .stock_vllm import StockVllm

Protocol = Literal["auto", "fused-distill", "openai", "sglang"]
T = TypeVar("T")


class TeacherClient(AbstractContextManager["TeacherClient"]):
    """Client of one teacher behind one or more servers. Threads and forked processes may share a client.

    A call lasts until its deadline: servers that are unreachable, restart or are busy are tried again, and
    after ten seconds a warning says what is tried again and why. Ctrl-C and `close` end a call at once.

    Args:
        url: one server, or several that serve the same teacher; when one fails, the next is tried.
        token: bearer token.
        protocol: "fused-distill", "openai" (a stock vLLM server's /v1/completions with prompt_logprobs),
            "sglang" (an SGLang server's /generate), or "auto" to detect which of them the server speaks.
        model: model name for "openai" and "sglang". None: the first that the server lists.
        timeout_seconds: limit between two bytes of one attempt; longer than the server's own limit of 300 s.
        deadline_seconds: limit of one call, all attempts together.
        concurrency: number of requests in flight.
        request_tokens: tokens per request; longer calls are divided into several requests.
        retries: see RetryPolicy. The default retries an unreachable or busy server until the deadline.
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
        if protocol not in get_args(Protocol):
            raise ValueError(f"protocol must be one of {get_args(Protocol)}, got {protocol!r}")
        if model is not None and (not isinstance(model, str) or not model):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"model must be a name, got {model!r}")
        self.deadline_seconds = positive_number("deadline_seconds", deadline_seconds)
        self.request_tokens = whole_number("request_tokens", request_tokens, at_least=1)
        self._protocol: Protocol = protocol
        self._head_sha256: str | None = None  # checksum of the head that head() returned
        self._description: dict[str, Any] | None = None  # /v1/teacher
        self._http = RetryingClient(
            url,
            token=token,
            timeout_seconds=timeout_seconds,
            retries=retries,
            transport=transport,
            concurrency=concurrency,
        )
        self._stock_servers: dict[Protocol, StockServer] = {
            "openai": StockVllm(self._http, model),
            "sglang": StockSglang(self._http, model),
        }
        self._same_weights = SameFingerprint()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Pending calls of other threads fail at once."""
        self._http.close()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until a server answers.

        Args:
            timeout: seconds. None: deadline_seconds.

        Raises:
            ValueError: timeout is invalid.
            ServerError: no server was ready in time, or one refused the client, e.g. for its token.
        """
        seconds = self.deadline_seconds if timeout is None else positive_number("timeout", timeout)
        self._info(time.monotonic() + seconds)

    def info(self) -> dict[str, Any]:
        """Return the server's description: /v1/teacher, or the model's entry in a stock server's /v1/models.

        Raises:
            ServerError: no server gave a valid description before the deadline.
        """
        return self._info(time.monotonic() + self.deadline_seconds)

    def _info(self, deadline: float) -> dict[str, Any]:
        if (stock := self._stock(deadline)) is not None:
            return stock.description(deadline)
        return self._http.send_one("GET", "/v1/teacher", deadline, teacher_description)

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
        if (stock := self._stock(deadline)) is not None:
            stock.check_limits(top_logprobs, length, deadline)
            return
        check_limits(self._describe(deadline), top_logprobs, length)

    def head(self, cache: Path | str | None = None) -> LMHeadParams:
        """Return the teacher's LM head on the CPU. It is downloaded once and cached by its checksum.

        Args:
            cache: cache folder. None: fused-distill under $XDG_CACHE_HOME or ~/.cache.

        Raises:
            ValueError: cache is no folder.
            ServerError: no server gave the head, e.g. because it lacks the capability "hidden_states";
                TeacherError if the head does not fit the server's description or is not finite.
        """
        folder = cache_folder(cache)
        deadline = time.monotonic() + self.deadline_seconds
        description = self._require_hidden_states(deadline)
        sha256 = self._http.send_one("HEAD", HEAD_PATH, deadline, _etag)
        path = folder / f"head-{sha256}.safetensors"
        if not path.exists() or file_sha256(path) != sha256:  # missing or damaged
            self._download_head(path, sha256, deadline, head_bytes(description))
        try:
            head = load_head(path)
            check_head(head, description)
        except ValueError as error:
            raise TeacherError(f"the server's LM head is invalid: {error}") from None
        self._head_sha256 = sha256
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
        if dtype not in get_args(HiddenDtype):
            raise ValueError(f"dtype must be one of {get_args(HiddenDtype)}, got {dtype!r}")
        deadline = time.monotonic() + self.deadline_seconds
        description = self._require_hidden_states(deadline)
        hidden_size: int = description["hidden_size"]

        def send(part: ScoringRequest, first: int) -> HiddenStates:
            body = {
                "sequences": part.sequences,
                "prompt_lengths": part.prompt_lengths,
                "response": "hidden_states",
                "response_format": "binary",
                "dtype": dtype,
            }
            max_bytes = part.hidden_bytes(hidden_size, dtype)
            decode = self._same_weights.then(lambda r: decode_hidden(r.content))
            hidden = self._http.send("POST", SCORE_PATH, deadline, decode, body, max_bytes=max_bytes)
            part.check_hidden_states(hidden, first, hidden_size, dtype)
            if self._head_sha256 not in (None, hidden.head_sha256):
                raise TeacherError("the hidden states belong to another head than head() returned")
            return hidden

        parts = self._send_parts(request, send, description["limits"]["numbers"] // hidden_size)
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
            temperature: > 0, divides the teacher's logits; must be 1 with a stock server.
            score_ids: M further tokens per sequence and position to score; not with protocol "openai".
            vocab_size: number of tokens, from the first, that the distribution is over, for a student with a
                shorter LM head; not with a stock server. None: all rows of the teacher's head.

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
        stock = self._stock(deadline)
        if stock is not None:
            stock.check(request, deadline)
        rows = None if stock else vocab_size or self._describe(deadline)["vocab_size"]

        def send(part: ScoringRequest, first: int) -> TeacherLogprobs:
            if stock is not None:
                answer = stock.score(part, deadline)
            else:
                body = {**vars(part), "response_format": "binary"}
                decode = self._same_weights.then(lambda r: decode_binary(r.content))
                max_bytes = part.binary_bytes
                answer = self._http.send("POST", SCORE_PATH, deadline, decode, body, max_bytes=max_bytes)
            part.check_answer(answer, first, rows)
            return answer

        if stock is not None:
            max_tokens = stock.parts_tokens(request, self.request_tokens)
        else:
            width = 1 + request.top_logprobs + request.score_count
            max_tokens = self._describe(deadline)["limits"]["numbers"] // width
        return TeacherLogprobs.join(self._send_parts(request, send, max_tokens))

    def _send_parts(
        self, request: ScoringRequest, send: Callable[[ScoringRequest, int], T], max_tokens: int
    ) -> list[T]:
        parts = request.parts(min(self.request_tokens, max_tokens))
        return self._http.run([partial(send, part, first) for first, part in parts])

    def _download_head(self, path: Path, sha256: str, deadline: float, max_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = Path(file.name)

            def check(_: httpx.Response) -> None:
                file.flush()
                if file_sha256(partial) != sha256:
                    raise ValueError("the downloaded head does not match its checksum")

            try:
                self._http.send_one("GET", HEAD_PATH, deadline, check, file=file.file, max_bytes=max_bytes)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _detect_protocol(self, deadline: float) -> Protocol:
        """Detect the servers' protocol on first use."""
        if self._protocol == "auto":
            description = self._http.send_one(
                "GET",
                "/v1/teacher",
                deadline,
                lambda r: teacher_description(r) if r.status_code == 200 else None,
                accepted=(200, 404),
            )
            if description is None:  # the 404 alone may be a gateway's
                owner = self._http.send_one("GET", "/v1/models", deadline, first_model).get("owned_by")
                self._protocol = "sglang" if owner == "sglang" else "openai"
            else:
                self._description, self._protocol = description, "fused-distill"
        return self._protocol

    def _stock(self, deadline: float) -> StockServer | None:
        """Return how to ask the servers, if they are not of our protocol."""
        return self._stock_servers.get(self._detect_protocol(deadline))

    def _describe(self, deadline: float) -> dict[str, Any]:
        """Return the description of a server of our protocol, requested once."""
        description = self._description
        if description is None:
            description = self._http.send_one("GET", "/v1/teacher", deadline, teacher_description)
            self._description = description
        return description

    def _require_hidden_states(self, deadline: float) -> dict[str, Any]:
        """Return the server's description, if it gives hidden states."""
        if (stock := self._stock(deadline)) is not None:
            raise ValueError(f"a stock {stock.name} server gives no hidden states")
        description = self._describe(deadline)
        if "hidden_states" not in description["capabilities"]:
            reason = f"only {description['capabilities']}"
            raise TeacherError(f"this teacher's engine has no hidden_states, {reason}")
        return description


def _etag(response: httpx.Response) -> str:
    sha256 = response.headers["etag"].removeprefix("W/").strip('"')
    if len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"the head's checksum must have 64 hexadecimal digits, got {sha256!r}")
    return sha256
