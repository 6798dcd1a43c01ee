"""The teacher server and client over real sockets, with a tiny model and with engines that misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from cases import INTERPRETED
from fused_distill import fused_linear_topk_jsd
from fused_distill.serving.client.align import align
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.client.retry import RetryPolicy, ServerError
from fused_distill.serving.protocol import logprobs as wire
from fused_distill.serving.protocol.logprobs import TeacherLogprobs
from fused_distill.serving.protocol.packing import VERSION
from fused_distill.serving.protocol.request import ScoringOptions, TokenSequence
from fused_distill.serving.server.app import ServerLimits, create_app
from fused_distill.serving.server.batching import BatchLimits
from fused_distill.serving.server.transformers_engine import TeacherInfo, TransformersEngine

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

VOCAB, LENGTH = 50, 64
FAST = RetryPolicy(attempts=5, first_wait_seconds=0.02, longest_wait_seconds=0.1)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=LENGTH,
        final_logit_softcapping=10.0,
    )
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # distributions that are not nearly uniform
    return made


class Served:
    """A server in a thread, on a port of the system's choice."""

    def __init__(self, app: Any, port: int = 0):
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
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
def serving_app(app: Any) -> Iterator[Served]:
    served = Served(app)
    try:
        yield served
    finally:
        served.stop()


def serving(engine: Any, **options: Any) -> AbstractContextManager[Served]:
    return serving_app(create_app(engine, **options))


@pytest.fixture(scope="module")
def url(model: Any) -> Iterator[str]:
    with serving(TransformersEngine(model)) as served:
        yield served.url


def random_sequences(count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, VOCAB, generator.integers(1, 20)).tolist() for _ in range(count)]
    return sequences, [int(generator.integers(0, len(s) + 1)) for s in sequences]


def direct(
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


def completions(sequences: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
    tokens = [t for s, p in zip(sequences, prompt_lengths, strict=True) for t in s[max(p, 1) :]]
    return torch.tensor(tokens, dtype=torch.int64)


def assert_right(
    answer: TeacherLogprobs,
    model: Any,
    sequences: list[list[int]],
    prompts: list[int],
    k: int,
    t: float,
    vocab_size: int = VOCAB,
) -> None:
    want = direct(model, sequences, prompts, t, vocab_size)
    actual = want.gather(-1, completions(sequences, prompts).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(answer.actual_logprobs, actual.numpy(), atol=2e-5)
    np.testing.assert_allclose(answer.logprobs, want.topk(k).values.numpy(), atol=2e-5)
    np.testing.assert_allclose(
        answer.logprobs, want.gather(-1, torch.from_numpy(answer.ids).long()).numpy(), atol=2e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [0, 1, 7, VOCAB])
def test_answers_equal_a_direct_forward_pass(url: str, model: Any, k: int, temperature: float) -> None:
    sequences, prompts = random_sequences(9)
    with TeacherClient(url, request_tokens=30) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, top_logprobs=k, temperature=temperature)
    assert_right(answer, model, sequences, prompts, k, temperature)


def test_chosen_ids_are_scored(url: str, model: Any) -> None:
    sequences, prompts = random_sequences(5)
    generator = np.random.default_rng(1)
    counts = [max(len(s) - max(p, 1), 0) for s, p in zip(sequences, prompts, strict=True)]
    ids = [generator.integers(0, VOCAB, (count, 3)).tolist() for count in counts]
    with TeacherClient(url, request_tokens=20) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, score_ids=ids)
    chosen = torch.tensor([row for own in ids for row in own])
    want = direct(model, sequences, prompts).gather(-1, chosen)
    assert answer.score_logprobs is not None
    np.testing.assert_allclose(answer.score_logprobs, want.numpy(), atol=2e-5)


def test_a_shorter_vocabulary_has_all_of_the_probability(url: str, model: Any) -> None:
    generator = np.random.default_rng(2)
    sequences = [generator.integers(0, 20, 9).tolist() for _ in range(3)]
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, [2, 3, 4], top_logprobs=20, vocab_size=20)
    assert_right(answer, model, sequences, [2, 3, 4], 20, 1.0, vocab_size=20)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/get_sequence_logprobs/", json=body, timeout=60)


def test_binary_and_json_responses_carry_the_same_fields(url: str) -> None:
    asked = {
        "sequences": [[1, 2, 3, 4], [5, 6]],
        "prompt_lengths": [2, 0],
        "top_logprobs": 3,
        "score_ids": [[[1], [2]], [[3]]],
    }
    binary = wire.decode_binary(post(url, **asked, response_format="binary").content)
    for form in ("json", "base64"):
        other = wire.decode_json(post(url, **asked, response_format=form).json())
        for name in ("lengths", "logprobs", "ids", "actual_logprobs", "score_logprobs"):
            np.testing.assert_array_equal(getattr(other, name), getattr(binary, name))


GOOD: dict[str, Any] = {"sequences": [[1, 2, 3]], "prompt_lengths": [1]}
BAD = [
    ("sequences", {"sequences": []}),
    ("sequences", {"sequences": [["a"]]}),
    ("sequences.0.0", {"sequences": [[-1]]}),
    (r"sequences\[0\]", {"sequences": [[]], "prompt_lengths": [0]}),
    (r"sequences\[0\]", {"sequences": [[VOCAB]]}),
    (r"sequences\[1\]", {"sequences": [[1], [1] * (LENGTH + 1)], "prompt_lengths": [0, 0]}),
    ("prompt_lengths", {"prompt_lengths": [1, 1]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [4]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [-1]}),
    ("top_logprobs", {"top_logprobs": VOCAB + 1}),
    ("top_logprobs", {"top_logprobs": -1}),
    ("temperature", {"temperature": 0}),
    ("response_format", {"response_format": "xml"}),
    ("score_ids", {"score_ids": [[[1]], [[1]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1]]]}),
    ("score_ids", {"score_ids": [[[1], [1, 2]]]}),
    (r"score_ids\[0\]", {"score_ids": [[[1], [VOCAB]]]}),
    ("unknown", {"unknown": 1}),
    ("vocab_size", {"vocab_size": 0}),
    ("vocab_size", {"vocab_size": VOCAB + 1}),
    (r"sequences\[0\]", {"vocab_size": 3}),
    ("top_logprobs", {"vocab_size": 5, "top_logprobs": 6}),
    (r"score_ids\[0\]", {"vocab_size": 5, "score_ids": [[[1], [5]]]}),
    ("sequences.0.0", {"sequences": [[True]]}),
    ("prompt_lengths.0", {"prompt_lengths": ["1"]}),
    ("temperature", {"temperature": 1e-9}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD)])
def test_a_bad_field_is_named(url: str, name: str, change: dict[str, Any]) -> None:
    response = post(url, **{**GOOD, **change})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(name.replace("\\", ""))


GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[1, 2",
    b"null",
    b"[" * 10**5,
    b'{"sequences": [[' + b"9" * 5000 + b"]]}",
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_bodies_are_refused(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{url}/get_sequence_logprobs/", content=body, headers=headers)
    assert response.status_code == 422
    assert len(response.content) < 1000
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_is_too_large_is_refused_unread(model: Any) -> None:
    with serving(TransformersEngine(model), limits=ServerLimits(body_bytes=1000)) as served:
        response = httpx.post(f"{served.url}/get_sequence_logprobs/", content=b"x" * 1001)
        assert response.status_code == 413


def test_a_body_without_a_length_is_refused(url: str) -> None:
    response = httpx.post(f"{url}/get_sequence_logprobs/", content=iter([b"{}"]))
    assert response.status_code == 411


def test_a_body_full_of_errors_gets_a_short_answer(url: str) -> None:
    response = post(url, sequences=[[-1] * 10**5], prompt_lengths=[0])
    assert response.status_code == 422
    assert len(response.content) < 1000


def test_a_token_is_asked_for(model: Any) -> None:
    with serving(TransformersEngine(model), token="secret") as served:
        assert httpx.get(f"{served.url}/v1/teacher").status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        with TeacherClient(served.url, token="secret") as client:
            assert client.info()["vocab_size"] == VOCAB
        with TeacherClient(served.url, token="other") as client, pytest.raises(ServerError, match="401"):
            client.get_sequence_logprobs([[1, 2]], [1])


def test_the_teacher_describes_itself(url: str) -> None:
    with TeacherClient(url) as client:
        info = client.info()
    assert info["vocab_size"] == VOCAB
    assert info["max_length"] == LENGTH
    assert info["wire_version"] == VERSION


def test_metrics_count_requests_and_positions(model: Any) -> None:
    with serving(TransformersEngine(model)) as served:
        post(served.url, sequences=[[1, 2, 3, 4]], prompt_lengths=[1])
        post(served.url, sequences=[[1, 2]], prompt_lengths=[9])
        text = httpx.get(f"{served.url}/metrics").text
    assert 'teacher_requests_total{status="200"} 1.0' in text
    assert 'teacher_requests_total{status="422"} 1.0' in text
    assert "teacher_positions_total 3.0" in text
    assert "teacher_waiting_requests 0.0" in text


class FakeEngine:
    """Answers with the sequences' own tokens; can be held, can fail, knows whether two calls overlapped."""

    def __init__(self) -> None:
        self.info = TeacherInfo("fake", 1000, 1000, None)
        self.head_file = None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[tuple[list[TokenSequence], ScoringOptions]] = []
        self.inside = self.overlaps = 0

    def score(self, batch: list[TokenSequence], execution: ScoringOptions) -> list[TeacherLogprobs]:
        self.inside += 1
        self.overlaps += self.inside > 1
        self.batches.append((batch, execution))
        self.started.set()
        assert self.gate.wait(60)
        time.sleep(0.01)  # long enough for a second call to be seen
        self.inside -= 1
        if any(13 in s.tokens for s in batch):
            raise RuntimeError("token 13 is bad luck")
        return [
            TeacherLogprobs(
                np.array([s.positions]),
                np.zeros((s.positions, execution.top_logprobs), np.float32),
                np.zeros((s.positions, execution.top_logprobs), np.int32),
                -np.array(s.tokens[s.start :], np.float32),
            )
            for s in batch
        ]

    def close(self) -> None:
        pass


@contextmanager
def in_background(count: int, call: Any) -> Iterator[list[Any]]:
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(call, i) for i in range(count)]


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def waiting(url: str) -> int:
    text = httpx.get(f"{url}/metrics").text
    return int(float(text.split("teacher_waiting_requests ")[-1].split()[0]))


def test_requests_of_several_clients_share_a_batch_within_the_token_budget() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:

        def ask(i: int) -> httpx.Response:
            return post(served.url, sequences=[[1, 2, 3, 20 + i]], prompt_lengths=[1], top_logprobs=i % 2)

        with in_background(1, ask) as first:
            assert engine.started.wait(30)
            with in_background(8, ask) as others:
                wait_until(lambda: waiting(served.url) == 8)
                engine.gate.set()
        for i, future in enumerate(others):
            answer = wire.decode_json(future.result().json())
            assert answer.actual_logprobs.tolist() == [-2, -3, -(20 + i)]
        assert first[0].result().status_code == 200
    # 4 requests of either K; 3 of them are 12 tokens. Odd ones asked for K 1.
    assert sorted(len(batch) for batch, _ in engine.batches) == [1, 1, 1, 3, 3]
    for batch, execution in engine.batches:
        assert {s.tokens[-1] % 2 for s in batch} == {execution.top_logprobs}


def test_a_long_request_is_cut_into_batches_within_the_token_budget() -> None:
    engine = FakeEngine()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:
        sequences = [[1] * n for n in (2, 9, 3, 30, 1, 4)]
        answer = wire.decode_json(post(served.url, sequences=sequences, prompt_lengths=[1] * 6).json())
    assert answer.lengths.tolist() == [1, 8, 2, 29, 0, 3]
    sizes = [len(batch) * max(len(s.tokens) for s in batch) for batch, _ in engine.batches]
    assert sorted(sizes)[-1] == 30  # the sequence that is longer than the budget, alone
    assert sorted(sizes)[-2] <= 12


def test_one_owner_talks_to_the_engine() -> None:
    engine = FakeEngine()
    with (
        serving(engine) as served,
        in_background(
            16, lambda i: post(served.url, sequences=[[20 + i, 1]], prompt_lengths=[1], top_logprobs=i % 4)
        ) as futures,
    ):
        assert all(f.result().status_code == 200 for f in futures)
    assert engine.overlaps == 0


def test_an_error_reaches_every_request_of_its_batch_and_no_other() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine) as served:

        def ask(i: int) -> httpx.Response:
            # Requests 1 and 3 have K 1, and 3 holds the bad token; 0, 2 and 4 have K 0.
            return post(
                served.url, sequences=[[5, 13 if i == 3 else 1]], prompt_lengths=[1], top_logprobs=i % 2
            )

        with in_background(1, lambda _: ask(0)):
            assert engine.started.wait(30)
            with in_background(5, ask) as futures:
                wait_until(lambda: waiting(served.url) == 5)
                engine.gate.set()
        assert [f.result().status_code for f in futures] == [200, 500, 200, 500, 200]
        assert "token 13 is bad luck" in futures[1].result().json()["detail"]
        assert ask(0).status_code == 200


def test_a_full_queue_answers_429_with_a_time() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with (
        serving(engine, batch_limits=BatchLimits(max_waiting=2)) as served,
        in_background(1, lambda _: post(served.url, **GOOD)),
    ):
        assert engine.started.wait(30)  # that one is in the engine and does not wait
        with in_background(2, lambda _: post(served.url, **GOOD)) as futures:
            wait_until(lambda: waiting(served.url) == 2)
            refused = post(served.url, **GOOD)
            engine.gate.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert [f.result().status_code for f in futures] == [200, 200]


def test_a_client_that_leaves_frees_its_place() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine) as served:
        with in_background(1, lambda _: post(served.url, **GOOD)):
            assert engine.started.wait(30)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{served.url}/get_sequence_logprobs/", json={**GOOD, "top_logprobs": 9}, timeout=0.3
                )
            wait_until(lambda: waiting(served.url) == 0)
            engine.gate.set()
        post(served.url, **GOOD)
    assert all(execution.top_logprobs != 9 for _, execution in engine.batches)


class BrokenEngine(FakeEngine):
    """Answers that do not fit together, then NaN, then too few, then a way out of the process."""

    def score(self, batch: list[TokenSequence], execution: ScoringOptions) -> list[TeacherLogprobs]:
        good = super().score(batch, execution)
        call = len(self.batches)
        if call == 1:
            bad = good[0]
            return [
                TeacherLogprobs(
                    bad.lengths, np.zeros((1, 9), np.float32), np.zeros((1, 9), np.int32), bad.actual_logprobs
                ),
                *good[1:],
            ]
        if call == 2:
            good[0].actual_logprobs[:] = np.nan
        if call == 4:
            raise SystemExit(1)
        return good[:1] if call == 3 else good


@pytest.mark.parametrize("response_format", ["binary", "json"])
def test_an_engine_that_breaks_its_word_ends_no_server(response_format: str) -> None:
    with serving(BrokenEngine()) as served:
        asked = {"sequences": [[1, 2], [3, 4]], "prompt_lengths": [1, 1], "response_format": response_format}
        assert [post(served.url, **asked).status_code for _ in range(5)] == [500, 500, 500, 500, 200]


@pytest.mark.parametrize("sequences", [[[3]], [[3, 4]]])
def test_a_request_without_positions_gets_an_empty_answer(url: str, sequences: list[list[int]]) -> None:
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, [len(sequences[0])], top_logprobs=4)
    assert answer.lengths.tolist() == [0]


def test_score_ids_may_leave_a_part_without_positions(url: str) -> None:
    with TeacherClient(url, request_tokens=3) as client:
        answer = client.get_sequence_logprobs([[1, 2, 3], [5]], [1, 1], score_ids=[[[1], [2]], []])
    assert answer.score_logprobs is not None
    assert answer.score_logprobs.shape == (2, 1)


def test_more_sequences_than_a_request_takes_are_cut(url: str) -> None:
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs([[1, 2, 3]] * 600, [2] * 600)
    assert answer.lengths.tolist() == [1] * 600


def test_numpy_arguments_are_taken(url: str) -> None:
    with TeacherClient(url) as client:
        plain = client.get_sequence_logprobs([[1, 2, 3]], [1], score_ids=[[[4, 5], [6, 7]]])
        same = client.get_sequence_logprobs(
            np.array([[1, 2, 3]]), np.array([1]), score_ids=[np.array([[4, 5], [6, 7]])]
        )
    np.testing.assert_array_equal(same.score_logprobs, plain.score_logprobs)


def test_a_request_that_takes_too_long_answers_504() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, limits=ServerLimits(request_seconds=0.2)) as served:
        assert post(served.url, **GOOD).status_code == 504
        engine.gate.set()
        wait_until(lambda: post(served.url, **GOOD).status_code == 200)


def test_a_stopping_server_finishes_what_it_has() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    served = Served(create_app(engine))
    with in_background(1, lambda _: post(served.url, **GOOD)) as futures:
        assert engine.started.wait(30)
        served.server.should_exit = True
        time.sleep(0.3)
        engine.gate.set()
        assert futures[0].result().status_code == 200
    served.stop()


def test_the_client_survives_a_restart_of_the_server(model: Any) -> None:
    served = Served(create_app(TransformersEngine(model)))
    sequences, prompts = random_sequences(12)
    patient = RetryPolicy(attempts=60, first_wait_seconds=0.05, longest_wait_seconds=0.2)
    with TeacherClient(served.url, request_tokens=1, concurrency=3, retries=patient) as client:
        client.get_sequence_logprobs(sequences[:1], prompts[:1])
        served.stop()
        with in_background(
            1, lambda _: client.get_sequence_logprobs(sequences, prompts, top_logprobs=4)
        ) as futures:
            time.sleep(0.3)
            again = Served(create_app(TransformersEngine(model)), port=served.port)
            answer = futures[0].result()
        again.stop()
    assert_right(answer, model, sequences, prompts, 4, 1.0)


def test_the_client_goes_to_the_next_server(url: str, model: Any) -> None:
    with TeacherClient(["http://127.0.0.1:9", url], retries=FAST) as client:
        assert_right(
            client.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=2), model, [[1, 2, 3]], [1], 2, 1.0
        )


def answering(*responses: httpx.Response) -> tuple[TeacherClient, list[httpx.Request]]:
    """A client whose server gives these responses, the last one again and again."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        given = responses[min(len(seen), len(responses)) - 1]
        return httpx.Response(given.status_code, headers=given.headers, content=given.content)

    transport = httpx.MockTransport(handle)
    return TeacherClient("http://teacher", protocol="fused-distill", retries=FAST, transport=transport), seen


def one_position(logprob: float = -1.0, actual: float = -2.0) -> httpx.Response:
    answer = TeacherLogprobs(
        np.array([1]),
        np.array([[logprob]], np.float32),
        np.array([[4]], np.int32),
        np.array([actual], np.float32),
    )
    return httpx.Response(200, content=wire.encode_binary(answer))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    client, seen = answering(httpx.Response(status), httpx.Response(status), one_position())
    assert client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]
    assert len(seen) == 3
    assert len({request.content for request in seen}) == 1


BROKEN = [
    httpx.Response(200, content=b"FDT nonsense"),
    httpx.Response(200, content=b""),
    httpx.Response(503, json=[]),
    httpx.Response(503, json="busy"),
    httpx.Response(500, content=b"<html>"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_an_answer_that_cannot_be_read_is_asked_for_again(broken: httpx.Response) -> None:
    client, seen = answering(broken, one_position())
    assert client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]
    assert len(seen) == 2


def test_a_teacher_that_stays_broken_is_an_error_of_its_own() -> None:
    client, seen = answering(httpx.Response(200, content=b"nonsense"))
    with pytest.raises(ServerError, match="WireError"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == FAST.attempts


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    client, seen = answering(httpx.Response(status, json={"detail": "because"}))
    with pytest.raises(ServerError, match=f"{status} because"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == 1


def test_the_deadline_ends_all_attempts() -> None:
    client, seen = answering(httpx.Response(503, headers={"Retry-After": "60"}))
    client.deadline_seconds = 0.2
    with pytest.raises(ServerError, match="503"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (one_position(actual=-np.inf), "no number for sequence 0 at token 1"),
        (one_position(actual=np.nan), "no number for sequence 0 at token 1"),
        (one_position(logprob=np.nan), "no number for sequence 0 at token 1"),
        (one_position(logprob=-np.inf), "no number for sequence 0 at token 1"),
    ],
)
def test_a_missing_number_is_an_error_that_names_the_position(response: httpx.Response, message: str) -> None:
    client, _ = answering(response)
    with pytest.raises(TeacherError, match=message):
        client.get_sequence_logprobs([[1, 2]], [1])


def test_an_answer_to_another_question_is_an_error() -> None:
    client, _ = answering(one_position())
    with pytest.raises(TeacherError, match=r"\[1\] positions, expected \[2\]"):
        client.get_sequence_logprobs([[1, 2, 3]], [1])
    with pytest.raises(TeacherError, match=r"\(1, None\) log-probabilities a position, expected \(3, None\)"):
        client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=3)


CLIENT_BAD = [
    ("sequences", {"sequences": []}),
    (r"sequences\[1\]", {"sequences": [[1], []], "prompt_lengths": [0, 0]}),
    ("prompt_lengths", {"prompt_lengths": [1, 2]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [4]}),
    (r"prompt_lengths\[0\]", {"prompt_lengths": [-1]}),
    ("score_ids", {"score_ids": []}),
    ("vocab_size", {"vocab_size": 0}),
]


@pytest.mark.parametrize(
    ("name", "change"), CLIENT_BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CLIENT_BAD)]
)
def test_the_client_names_a_bad_argument_before_any_request(name: str, change: dict[str, Any]) -> None:
    client, seen = answering(one_position())
    with pytest.raises(ValueError, match=f"^{name} must"):
        client.get_sequence_logprobs(**{**GOOD, **change})
    assert not seen


def vllm_server(logprobs: list[dict[str, Any] | None]) -> tuple[TeacherClient, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.path == "/v1/teacher":
            return httpx.Response(404)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "stock"}]})
        return httpx.Response(200, json={"choices": [{"index": 0, "prompt_logprobs": logprobs}]})

    return TeacherClient("http://vllm", retries=FAST, transport=httpx.MockTransport(handle)), seen


def test_a_stock_vllm_server_is_detected_and_asked_for_prompt_logprobs() -> None:
    position = {
        "7": {"logprob": -0.5, "rank": 1},
        "3": {"logprob": -1.5, "rank": 2},
        "9": {"logprob": -4.0, "rank": 20},
    }
    client, seen = vllm_server([None, position])
    answer = client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)
    assert answer.ids.tolist() == [[7, 3]]
    assert answer.logprobs.tolist() == [[-0.5, -1.5]]
    assert answer.actual_logprobs.tolist() == [-4.0]
    asked = json.loads(seen[-1].content)
    assert (asked["model"], asked["prompt"], asked["prompt_logprobs"]) == ("stock", [[1, 9]], 2)


@pytest.mark.parametrize(
    "position", [None, {}, {"7": {"logprob": None, "rank": 1}}, {"7": {"logprob": -0.5, "rank": 1}}]
)
def test_a_number_that_vllm_leaves_out_is_an_error(position: Any) -> None:
    client, _ = vllm_server([None, position])
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1])


def test_the_actual_token_is_not_taken_for_a_missing_likely_one() -> None:
    client, _ = vllm_server([None, {"7": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -4.0, "rank": 30}}])
    with pytest.raises(TeacherError, match="no number for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=2)


def test_vllm_may_be_asked_for_the_actual_tokens_alone() -> None:
    client, _ = vllm_server([None, {"9": {"logprob": -4.0, "rank": 30}}])
    assert client.get_sequence_logprobs([[1, 9]], [1], top_logprobs=0).logprobs.shape == (1, 0)


def test_what_vllm_cannot_do_is_refused_with_the_reason() -> None:
    client, _ = vllm_server([])
    with pytest.raises(ValueError, match="temperature must be 1 with a stock vLLM server, which ignores it"):
        client.get_sequence_logprobs([[1, 2]], [1], temperature=0.5)
    with pytest.raises(ValueError, match="score_ids must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], score_ids=[[[1]]])
    with pytest.raises(ValueError, match="vocab_size must be None with a stock vLLM server"):
        client.get_sequence_logprobs([[1, 2]], [1], vocab_size=9)


@pytest.mark.parametrize("layout", ["left and right padded", "packed"])
def test_aligned_answers_give_the_loss_of_the_teacher_itself(url: str, model: Any, layout: str) -> None:
    sequences, prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]], [3, 1, 2]
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, top_logprobs=6)
    if layout == "packed":  # one row, sequences one after the other
        rows = [[(i, t) for i, s in enumerate(sequences) for t in range(len(s))]]
    else:  # prompts end at column 3
        rows = [
            [None] * (3 - p) + [(i, t) for t in range(len(s))] + [None] * (5 - (3 - p) - len(s))
            for i, (s, p) in enumerate(zip(sequences, prompts, strict=True))
        ]
    # True where the next token of the same sequence belongs to its completion.
    mask = torch.tensor(
        [[c is not None and prompts[c[0]] <= c[1] + 1 < len(sequences[c[0]]) for c in row] for row in rows]
    )
    aligned = align(answer, mask)
    hidden = torch.randn(*mask.shape, 8)
    head = torch.randn(VOCAB, 8)
    want = direct(model, sequences, prompts).topk(6)
    got = fused_linear_topk_jsd(hidden, head, aligned.logprobs, aligned.ids, mask=mask)
    plain = fused_linear_topk_jsd(hidden[mask], head, want.values, want.indices)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
    assert (aligned.logprobs[~mask] == -torch.inf).all()


def test_a_mask_that_does_not_fit_the_answer_is_named() -> None:
    answer = wire.decode_binary(one_position().content)
    with pytest.raises(ValueError, match="mask must be True at the answer's 1 positions, got 2"):
        align(answer, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        align(answer, torch.ones(1))


def test_health_tells_of_an_engine_that_fails_on_every_batch() -> None:
    engine = FakeEngine()
    with serving(engine) as served:
        for _ in range(5):
            assert httpx.get(f"{served.url}/health").status_code == 200
            assert post(served.url, sequences=[[13, 1]], prompt_lengths=[1]).status_code == 500
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert post(served.url, sequences=[[1, 2]], prompt_lengths=[1]).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
