"""Batching of requests through one engine, its queue and its errors."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import httpx
import pytest
from fused_distill.serving.server.batching import MOST_PASSED_OVER, BatchLimits
from limits import seconds
from serving_cases import (
    VALID_BODY,
    FakeEngine,
    from_json,
    in_background,
    post,
    serving,
    wait_until,
    waiting_requests,
)


def test_requests_of_several_clients_share_a_batch_within_the_token_budget() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:

        def ask(i: int) -> httpx.Response:
            return post(served.url, sequences=[[1, 2, 3, 20 + i]], prompt_lengths=[1], top_logprobs=i % 2)

        with in_background(1, ask) as first:
            assert engine.started.wait(30)
            with in_background(8, ask) as others:
                wait_until(lambda: waiting_requests(served.url) == 8)
                engine.gate.set()
        for i, future in enumerate(others):
            answer = from_json(future.result().json())
            assert answer.actual_logprobs.tolist() == [-2, -3, -(20 + i)]
        assert first[0].result().status_code == 200
    # 4 requests of either K; 3 of them are 12 tokens. Odd requests have K 1.
    assert sorted(len(batch) for batch, _ in engine.batches) == [1, 1, 1, 3, 3]
    for batch, options in engine.batches:
        assert {s.tokens[-1] % 2 for s in batch} == {options.top_logprobs}


def test_a_long_request_is_cut_into_batches_within_the_token_budget() -> None:
    engine = FakeEngine()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:
        sequences = [[1] * n for n in (2, 9, 3, 30, 1, 4)]
        answer = from_json(post(served.url, sequences=sequences, prompt_lengths=[1] * 6).json())
    assert answer.lengths.tolist() == [1, 8, 2, 29, 0, 3]
    sizes = [len(batch) * max(len(s.tokens) for s in batch) for batch, _ in engine.batches]
    assert sorted(sizes)[-1] == 30  # the sequence that is longer than the budget, alone
    assert sorted(sizes)[-2] <= 12


def test_an_error_reaches_no_request_with_other_options() -> None:
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
                wait_until(lambda: waiting_requests(served.url) == 5)
                engine.gate.set()
        assert [f.result().status_code for f in futures] == [200, 500, 200, 500, 200]
        assert "token 13 is bad luck" in futures[1].result().json()["detail"]
        assert ask(0).status_code == 200


def test_a_full_queue_answers_429_with_a_time() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with (
        serving(engine, batch_limits=BatchLimits(max_waiting=2)) as served,
        in_background(1, lambda _: post(served.url, **VALID_BODY)),
    ):
        assert engine.started.wait(30)  # that one is in the engine and does not wait
        with in_background(2, lambda _: post(served.url, **VALID_BODY)) as futures:
            wait_until(lambda: waiting_requests(served.url) == 2)
            refused = post(served.url, **VALID_BODY)
            engine.gate.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert [f.result().status_code for f in futures] == [200, 200]


def test_a_client_that_disconnects_frees_its_place() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine) as served:
        with in_background(1, lambda _: post(served.url, **VALID_BODY)):
            assert engine.started.wait(30)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{served.url}/get_sequence_logprobs/",
                    json={**VALID_BODY, "top_logprobs": 9},
                    timeout=0.3,
                )
            wait_until(lambda: waiting_requests(served.url) == 0)
            engine.gate.set()
        post(served.url, **VALID_BODY)
    assert all(options.top_logprobs != 9 for _, options in engine.batches)


class WatchedEngine(FakeEngine):
    """Knows the threads that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: Counter[int] = Counter()

    def score(self, batch: Any, options: Any) -> Any:
        self.threads[threading.get_ident()] += 1
        return super().score(batch, options)


def test_one_thread_calls_the_engine_one_batch_at_a_time() -> None:
    engine = WatchedEngine()
    with serving(engine) as served:

        def ask(i: int) -> int:
            other = ("/v1/teacher", "/health", "/metrics")[i % 3]
            if i % 2:
                return httpx.get(f"{served.url}{other}", timeout=seconds(60)).status_code
            body = {"sequences": [[20 + i, 1]], "prompt_lengths": [1], "top_logprobs": i % 8}
            return post(served.url, **body).status_code

        with in_background(48, ask) as futures:
            assert {future.result() for future in futures} == {200}
    assert engine.overlaps == 0
    assert len(engine.threads) == 1
    assert sum(engine.threads.values()) >= 4  # one batch per value of top_logprobs


def test_an_error_reaches_every_request_of_its_batch_and_no_other() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:

        def ask(i: int) -> httpx.Response:
            # Three sequences of four tokens make a batch; a request of two sequences may lie in two batches.
            sequences = [[20 + i, 1, 1, 13 if i in (3, 9) else 1]] * (1 + i % 2)
            return post(served.url, sequences=sequences, prompt_lengths=[1] * len(sequences))

        def ask_in_order(i: int) -> httpx.Response:
            wait_until(lambda: waiting_requests(served.url) == i)
            return ask(i)

        with in_background(1, lambda _: ask(0)):
            assert engine.started.wait(30)
            with in_background(12, ask_in_order) as futures:
                wait_until(lambda: waiting_requests(served.url) == 12)
                engine.gate.set()
        failed = {i for i, future in enumerate(futures) if future.result().status_code == 500}
        right = {i for i, future in enumerate(futures) if future.result().status_code == 200}
    batches = [[s.tokens for s in batch] for batch, _ in engine.batches]
    unlucky = {tokens[0] - 20 for batch in batches if any(13 in t for t in batch) for tokens in batch}
    assert failed == unlucky
    assert right == set(range(12)) - unlucky
    assert len(failed) > 2  # more than those that hold the token
    assert right


def test_a_short_request_does_not_wait_for_all_batches_of_a_long_one() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=10)) as served:

        def ask(i: int) -> httpx.Response:
            if i == 0:
                return post(served.url, sequences=[[1] * 10] * 20, prompt_lengths=[1] * 20)
            assert engine.started.wait(30)
            return post(served.url, sequences=[[2, 3]], prompt_lengths=[1])

        with in_background(2, ask) as futures:
            wait_until(lambda: waiting_requests(served.url) == 2)
            engine.gate.set()
        assert [future.result().status_code for future in futures] == [200, 200]
    assert [[len(s.tokens) for s in batch] for batch, _ in engine.batches[:3]] == [[10], [2], [10]]


def test_short_requests_pass_a_long_one_over_a_few_times_only() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=10)) as served:

        def ask_in_order(i: int) -> httpx.Response:
            # The first takes the engine, the second has nine batches. No two share one: each has its own K.
            if i:
                assert engine.started.wait(30)
                wait_until(lambda: waiting_requests(served.url) == i - 1)
            sequences = [[1] * 10] * (9 if i == 1 else 1)
            return post(served.url, sequences=sequences, prompt_lengths=[1] * len(sequences), top_logprobs=i)

        with in_background(12, ask_in_order) as futures:
            wait_until(lambda: waiting_requests(served.url) == 11)
            engine.gate.set()
        assert {future.result().status_code for future in futures} == {200}
    order = [options.top_logprobs for _, options in engine.batches]
    assert order.index(1) == 1 + MOST_PASSED_OVER
