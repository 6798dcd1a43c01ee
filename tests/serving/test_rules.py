"""The eight rules at the end of the design, one test or two for each. Details are tested elsewhere."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from fused_distill.rollouts.base import Completion, Sampling
from fused_distill.rollouts.grouping import split_on_groups
from fused_distill.serving.protocol import logprobs as wire
from fused_distill.serving.protocol.logprobs import TeacherLogprobs
from fused_distill.serving.protocol.packing import WireError
from fused_distill.serving.server.batching import BatchLimits
from hypothesis import given
from hypothesis import strategies as st
from test_rollouts import choice, vllm
from test_serving import (
    FakeEngine,
    answering,
    in_background,
    one_position,
    post,
    serving,
    wait_until,
    waiting,
)
from test_serving_wire import answers, assert_same
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


@pytest.mark.parametrize("shape", [(100,), (4, 25)])
def test_rule_1_the_fused_path_computes_on_counted_tokens_only(shape: tuple[int, ...]) -> None:
    vocab, student_size, teacher_size = 50, 8, 6
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    mask = torch.rand(shape, generator=generator) < 0.3
    prompts = (~mask).unsqueeze(-1)
    student = randn(*shape, student_size).masked_fill(prompts, torch.nan).requires_grad_()
    teacher = randn(*shape, teacher_size).masked_fill(prompts, torch.nan)
    heads = randn(vocab, student_size).requires_grad_(), randn(vocab, teacher_size)
    with FlopCounterMode(display=False) as counter:
        loss = fused_linear_jsd(student, heads[0], teacher, heads[1], mask=mask, backend="torch")
        loss.backward()
    # Both models' logits, the gradients of hidden states and weight: of counted tokens, and of nothing else.
    assert counter.get_total_flops() == int(mask.sum()) * vocab * (6 * student_size + 2 * teacher_size)
    assert loss.isfinite()
    assert student.grad is not None
    assert (student.grad[~mask] == 0).all()


def test_rule_2_completions_are_grouped_by_an_explicit_id() -> None:
    # The server's order is any, prompts repeat in different groups, and groups have different sizes.
    choices = [choice(i) for i in range(6)]
    random.Random(0).shuffle(choices)
    found = vllm(*choices).generate([[5], [5], [5]], Sampling(n=2), groups=[7, 3, 7])
    members = {group: {c.tokens[0] for c in found if c.group == group} for group in (3, 7)}
    assert members == {7: {0, 1, 4, 5}, 3: {2, 3}}


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_rule_3_merged_answers_all_carry_score_logprobs_or_none_does(with_scores: list[bool]) -> None:
    made = [
        TeacherLogprobs(
            np.array([1]),
            np.full((1, 2), -i, np.float32),
            np.zeros((1, 2), np.int32),
            np.full(1, -i, np.float32),
            np.full((1, 3), -i, np.float32) if scores else None,
        )
        for i, scores in enumerate(with_scores)
    ]
    if len(set(with_scores)) == 2:
        with pytest.raises(WireError, match="all answers must carry score_logprobs or none, got a mixture"):
            TeacherLogprobs.join(made)
    else:
        for part, whole in zip(TeacherLogprobs.join(made).split(), made, strict=True):
            assert_same(part, whole)


def test_rule_3_merged_answers_all_carry_actual_logprobs() -> None:
    content = wire.encode_json(wire.decode_binary(one_position().content))
    del content["actual_logprobs"]
    with pytest.raises(WireError, match="JSON is no answer"):
        wire.decode_json(content)
    with pytest.raises(WireError, match="actual_logprobs must have shape"):
        TeacherLogprobs(
            np.array([1]), np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int32), np.zeros(0, np.float32)
        )


@pytest.mark.parametrize(
    ("prompt_lengths", "message"),
    [
        ([1, 4, 0], "prompt_lengths[1] must be between 0 and the sequence's 3 tokens, got 4"),
        ([1, 3, -1], "prompt_lengths[2] must be between 0 and the sequence's 1 tokens, got -1"),
        ([1, 3], "prompt_lengths must be 3, one a sequence, got 2"),
    ],
    ids=["too long", "negative", "too few"],
)
def test_rule_4_client_and_server_check_prompt_lengths_and_name_the_index(
    prompt_lengths: list[int], message: str
) -> None:
    sequences = [[1, 2], [3, 4, 5], [6]]
    client, seen = answering(one_position())
    with pytest.raises(ValueError, match=r"^prompt_lengths") as refused:
        client.get_sequence_logprobs(sequences, prompt_lengths)
    assert str(refused.value) == message
    assert not seen
    engine = FakeEngine()
    with serving(engine) as served:
        response = post(served.url, sequences=sequences, prompt_lengths=prompt_lengths)
    assert (response.status_code, response.json()["detail"]) == (422, message)
    assert not engine.batches


@given(answers())
def test_rule_5_binary_and_json_carry_the_same_fields(answer: TeacherLogprobs) -> None:
    for content in (wire.encode_json(answer), wire.encode_base64(answer)):
        from_json = wire.decode_json(json.loads(json.dumps(content)))
        from_binary = wire.decode_binary(wire.encode_binary(answer))
        assert_same(from_json, from_binary)
        assert_same(from_json, answer)


def test_rule_5_binary_and_json_carry_the_least_float32() -> None:
    least = float(np.finfo(np.float32).min)  # what a masked logit often is
    answer = wire.decode_binary(one_position(logprob=least, actual=least).content)
    assert_same(wire.decode_json(wire.encode_json(answer)), answer)


class WatchedEngine(FakeEngine):
    """Knows the threads that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: Counter[int] = Counter()

    def score(self, batch: Any, execution: Any) -> Any:
        self.threads[threading.get_ident()] += 1
        return super().score(batch, execution)


def test_rule_6_one_owner_talks_to_the_engine() -> None:
    engine = WatchedEngine()
    with serving(engine) as served:

        def ask(i: int) -> int:
            other = ("/v1/teacher", "/health", "/metrics")[i % 3]
            if i % 2:
                return httpx.get(f"{served.url}{other}", timeout=60).status_code
            asked = {"sequences": [[20 + i, 1]], "prompt_lengths": [1], "top_logprobs": i % 8}
            return post(served.url, **asked).status_code

        with in_background(48, ask) as futures:
            assert {future.result() for future in futures} == {200}
    assert engine.overlaps == 0
    assert len(engine.threads) == 1
    assert sum(engine.threads.values()) >= 4  # as many as there are different top_logprobs


def test_rule_7_an_error_reaches_every_request_of_its_batch_and_no_other() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, batch_limits=BatchLimits(batch_tokens=12)) as served:

        def ask(i: int) -> httpx.Response:
            # Three sequences of four tokens make a batch; a request of two sequences may lie in two batches.
            own = [[20 + i, 1, 1, 13 if i in (3, 9) else 1]] * (1 + i % 2)
            return post(served.url, sequences=own, prompt_lengths=[1] * len(own))

        with in_background(1, lambda _: ask(0)):
            assert engine.started.wait(30)
            with in_background(12, ask) as futures:
                wait_until(lambda: waiting(served.url) == 12)
                engine.gate.set()
        failed = {i for i, future in enumerate(futures) if future.result().status_code == 500}
        right = {i for i, future in enumerate(futures) if future.result().status_code == 200}
    batches = [[s.tokens for s in batch] for batch, _ in engine.batches]
    unlucky = {tokens[0] - 20 for batch in batches if any(13 in t for t in batch) for tokens in batch}
    assert failed == unlucky
    assert right == set(range(12)) - unlucky
    assert len(failed) > 2  # more than those that hold the token
    assert right


def test_rule_8_a_cycle_of_rollouts_is_split_on_group_boundaries() -> None:
    generator = random.Random(0)
    cycle = [
        Completion(group, [group], [number] * generator.randint(1, 40), [], "stop")
        for group in (5, 3, 11, 8, 2, 7, 1)
        for number in range(group)  # groups of different sizes
    ]
    generator.shuffle(cycle)
    slices = split_on_groups(cycle, 3)
    places = Counter(group for part in slices for group in {c.group for c in part})
    assert places == Counter([5, 3, 11, 8, 2, 7, 1])
    assert sorted(c for part in slices for c in part) == sorted(cycle)
    tokens = [sum(len(c.tokens) for c in part) for part in slices]
    assert max(tokens) < 1.2 * min(tokens)
