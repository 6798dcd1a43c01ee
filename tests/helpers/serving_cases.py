"""Servers, engines, clients and reference results that the tests of serving share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import RetryPolicy
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, encode_binary
from fused_distill.serving.protocol.request import SCORE_PATH, ScoringOptions, TokenSequence
from fused_distill.serving.server.app import create_app
from fused_distill.serving.server.connections import ConnectionLimits
from fused_distill.serving.server.engine import TeacherInfo
from fused_distill.serving.server.validation import ServerLimits
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from limits import seconds

VOCAB, LENGTH = 50, 64
VALID_BODY: dict[str, Any] = {"sequences": [[1, 2, 3]], "prompt_lengths": [1]}
FULL_BODY: dict[str, Any] = {
    "sequences": [[1, 2, 3], [4, 5]],
    "prompt_lengths": [1, 0],
    "top_logprobs": 2,
    "temperature": 0.5,
}
DESCRIPTION: dict[str, Any] = {
    "model": "described",
    "vocab_size": VOCAB,
    "max_length": LENGTH,
    "tokenizer_fingerprint": None,
    "capabilities": ["temperature", "score_ids", "vocab_size", "hidden_states"],
    "hidden_size": 4,
    "limits": {**asdict(ServerLimits()), "top_logprobs": VOCAB},
}
FAST_ATTEMPTS = 5
FAST_RETRIES = RetryPolicy(attempts=FAST_ATTEMPTS, first_wait_seconds=0.02, longest_wait_seconds=0.1)


class Served:
    """A server in a thread, on a port of the system's choice unless one is given."""

    def __init__(self, app: Any, connections: ConnectionLimits | None = None, port: int = 0):
        options = (connections or ConnectionLimits()).uvicorn_options()
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", **options)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def serving_app(app: Any, connections: ConnectionLimits | None = None) -> Iterator[Served]:
    served = Served(app, connections)
    try:
        yield served
    finally:
        served.stop()


def serving(
    engine: Any, connections: ConnectionLimits | None = None, **options: Any
) -> AbstractContextManager[Served]:
    return serving_app(create_app(engine, **options), connections)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{SCORE_PATH}", json=body, timeout=seconds(60))


class FakeEngine:
    """Answer with the sequences' own tokens. Can be held and can fail; counts overlapping calls."""

    def __init__(self) -> None:
        self.info = TeacherInfo("fake", 1000, 1000, None)
        self.dtype, self.device = "float32", "cpu"
        self.head_file = None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[tuple[list[TokenSequence], ScoringOptions]] = []
        self.inside = self.overlaps = 0

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> list[TeacherLogprobs]:
        self.inside += 1
        self.overlaps += self.inside > 1
        self.batches.append((batch, options))
        self.started.set()
        assert self.gate.wait(60)
        time.sleep(0.01)  # long enough for a second call to overlap
        self.inside -= 1
        if any(13 in s.tokens for s in batch):
            raise RuntimeError("token 13 is bad luck")
        return [
            TeacherLogprobs(
                np.array([s.positions]),
                np.full((s.positions, options.top_logprobs), -9.0, np.float32),
                np.tile(np.arange(options.top_logprobs, dtype=np.int32), (s.positions, 1)),
                -np.array(s.tokens[s.start :], np.float32),
            )
            for s in batch
        ]

    def close(self) -> None:
        pass


@contextmanager
def in_background(count: int, call: Callable[[int], Any]) -> Iterator[list[Future[Any]]]:
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(call, i) for i in range(count)]


def process_ended(pid: int) -> bool:
    """Return True if a process has ended, whether or not its parent knows."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition: Callable[[], bool], max_seconds: float = 30.0) -> None:
    until = time.monotonic() + max_seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def metric(url: str, name: str) -> int:
    """One of the server's Prometheus metrics, 0 before its first count."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next((line.split()[-1] for line in lines if line.startswith(f"{name} ")), "0")))


def waiting_requests(url: str) -> int:
    return metric(url, "teacher_waiting_requests")


def client_of_responses(*responses: httpx.Response) -> tuple[TeacherClient, list[httpx.Request]]:
    """Return a client whose server gives these responses, repeating the last, and the requests it gets.

    The server also gives its description, which is not among the responses and the requests.
    """
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/teacher":
            return httpx.Response(200, json=DESCRIPTION)
        requests.append(request)
        response = responses[min(len(requests), len(responses)) - 1]
        return httpx.Response(response.status_code, headers=response.headers, content=response.content)

    transport = httpx.MockTransport(handle)
    client = TeacherClient(
        "http://teacher", protocol="fused-distill", retries=FAST_RETRIES, transport=transport
    )
    return client, requests


def one_position(logprob: float = -1.0, actual: float = -2.0) -> httpx.Response:
    """Return a binary response of one position with K 1."""
    answer = TeacherLogprobs(
        np.array([1]),
        np.array([[logprob]], np.float32),
        np.array([[4]], np.int32),
        np.array([actual], np.float32),
    )
    return httpx.Response(200, content=encode_binary(answer))


def from_json(content: dict[str, Any]) -> TeacherLogprobs:
    """Read a JSON response as its documentation describes it."""

    def rows(name: str, dtype: type, *width: int) -> Any:
        values = [row for part in content[name] for row in part]
        assert [len(part) for part in content[name]] == content["lengths"]
        array = np.array(values, dtype=object).reshape(len(values), *width)
        return np.where(array == None, -np.inf, array).astype(dtype)  # noqa: E711

    assert content["version"] == 1
    scores = content["score_logprobs"]
    return TeacherLogprobs(
        np.array(content["lengths"], dtype=np.int64),
        rows("logprobs", np.float32, content["k"]),
        rows("ids", np.int32, content["k"]),
        rows("actual_logprobs", np.float32),
        None if scores is None else rows("score_logprobs", np.float32, content["m"]),
    )


@st.composite
def logprob_responses(draw: st.DrawFn) -> TeacherLogprobs:
    """Responses whose numbers float16 can hold."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    k, m, positions = draw(st.integers(0, 4)), draw(st.integers(0, 3)), sum(lengths)
    numbers = st.one_of(st.just(-np.inf), st.floats(-1e4, 0, width=16))

    def floats(*shape: int) -> Any:
        return draw(st_numpy.arrays(np.float32, shape, elements=numbers))

    return TeacherLogprobs(
        np.array(lengths, dtype=np.int64),
        floats(positions, k),
        draw(st_numpy.arrays(np.int32, (positions, k), elements=st.integers(0, 2**31 - 1))),
        floats(positions),
        floats(positions, m) if draw(st.booleans()) else None,
    )


def assert_same_response(got: TeacherLogprobs, want: TeacherLogprobs) -> None:
    for name in ("lengths", "logprobs", "ids", "actual_logprobs", "score_logprobs"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def random_sequences(count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, VOCAB, generator.integers(1, 20)).tolist() for _ in range(count)]
    return sequences, [int(generator.integers(0, len(s) + 1)) for s in sequences]


def direct_logprobs(
    model: Any,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float = 1.0,
    vocab_size: int = VOCAB,
) -> torch.Tensor:
    """(P, V) log-probabilities by one forward pass per sequence."""
    rows = [torch.empty(0, vocab_size)]
    for tokens, prompt_length in zip(sequences, prompt_lengths, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1, :vocab_size].float()
        rows.append(torch.log_softmax(logits / temperature, -1)[max(prompt_length, 1) - 1 :])
    return torch.cat(rows)


def scored_tokens(sequences: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
    tokens = [t for s, p in zip(sequences, prompt_lengths, strict=True) for t in s[max(p, 1) :]]
    return torch.tensor(tokens, dtype=torch.int64)


def assert_equals_forward_pass(
    answer: TeacherLogprobs,
    model: Any,
    sequences: list[list[int]],
    prompts: list[int],
    k: int,
    temperature: float = 1.0,
    vocab_size: int = VOCAB,
) -> None:
    want = direct_logprobs(model, sequences, prompts, temperature, vocab_size)
    actual = want.gather(-1, scored_tokens(sequences, prompts).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(answer.actual_logprobs, actual.numpy(), atol=2e-5)
    np.testing.assert_allclose(answer.logprobs, want.topk(k).values.numpy(), atol=2e-5)
    np.testing.assert_allclose(
        answer.logprobs, want.gather(-1, torch.from_numpy(answer.ids).long()).numpy(), atol=2e-5
    )
