"""Slices of a gradient-accumulation cycle: whole groups, every rollout once, nearly even."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from typing import NamedTuple

import pytest
from fused_distill.rollouts.base import Completion
from fused_distill.rollouts.grouping import split_on_groups
from hypothesis import given
from hypothesis import strategies as st


class Rollout(NamedTuple):
    """The members that grouping needs, and a number that identifies the rollout."""

    group: int
    tokens: range
    number: int


@st.composite
def cycles(draw: st.DrawFn, most_groups: int = 12) -> tuple[list[Rollout], int]:
    """Rollouts in any order, groups of any size with any ids, and a number of slices that they can fill."""
    groups = draw(st.lists(st.integers(-50, 50), min_size=1, max_size=most_groups, unique=True))
    more = draw(st.lists(st.sampled_from(groups), max_size=20))
    order = draw(st.permutations(groups + more))
    lengths = draw(st.lists(st.integers(0, 30), min_size=len(order), max_size=len(order)))
    rollouts = [Rollout(g, range(n), i) for i, (g, n) in enumerate(zip(order, lengths, strict=True))]
    return rollouts, draw(st.integers(1, len(groups)))


def load(part: list[Rollout]) -> int:
    return sum(len(r.tokens) for r in part)


@given(cycles())
def test_no_group_is_divided(cycle: tuple[list[Rollout], int]) -> None:
    parts = split_on_groups(*cycle)
    slices_of = Counter(group for part in parts for group in {r.group for r in part})
    assert set(slices_of.values()) == {1}


@given(cycles())
def test_no_rollout_is_lost_or_doubled(cycle: tuple[list[Rollout], int]) -> None:
    rollouts, slices = cycle
    parts = split_on_groups(rollouts, slices)
    assert sorted(r.number for part in parts for r in part) == [r.number for r in rollouts]


@given(cycles())
def test_no_slice_is_empty(cycle: tuple[list[Rollout], int]) -> None:
    parts = split_on_groups(*cycle)
    assert len(parts) == cycle[1]
    assert all(parts)


@given(cycles())
def test_the_order_within_a_slice_is_that_of_the_rollouts(cycle: tuple[list[Rollout], int]) -> None:
    for part in split_on_groups(*cycle):
        assert part == sorted(part, key=lambda r: r.number)


@given(cycles(), st.permutations(range(40)))
def test_the_order_of_the_rollouts_moves_no_group(cycle: tuple[list[Rollout], int], order: list[int]) -> None:
    rollouts, slices = cycle
    shuffled = sorted(rollouts, key=lambda r: order[r.number])
    parts, others = split_on_groups(rollouts, slices), split_on_groups(shuffled, slices)
    assert [set(part) for part in parts] == [set(other) for other in others]


@given(cycles(most_groups=6))
def test_the_largest_slice_is_within_a_third_of_the_best(cycle: tuple[list[Rollout], int]) -> None:
    rollouts, slices = cycle
    sizes: Counter[int] = Counter()
    for rollout in rollouts:
        sizes[rollout.group] += len(rollout.tokens)
    best = min(
        max(
            sum(s for s, owner in zip(sizes.values(), owners, strict=True) if owner == i)
            for i in range(slices)
        )
        for owners in product(range(slices), repeat=len(sizes))
    )
    largest = max(map(load, split_on_groups(rollouts, slices)))
    assert 3 * slices * largest <= (4 * slices - 1) * best


def test_groups_of_one_size_are_shared_out_evenly() -> None:
    rollouts = [Rollout(g, range(10), 0) for g in range(12) for _ in range(4)]
    assert [load(part) for part in split_on_groups(rollouts, 4)] == [120] * 4


def test_groups_without_tokens_fill_slices_too() -> None:
    parts = split_on_groups([Rollout(g, range(0), 0) for g in range(5)], 3)
    assert [len(part) for part in parts] == [2, 2, 1]


@pytest.mark.parametrize(
    ("groups", "slices", "message"),
    [
        ([], 1, "rollouts must have at least 1 groups, one per slice, got 0"),
        ([4, 4, 4], 2, "rollouts must have at least 2 groups, one per slice, got 1"),
        ([1, 2], 0, "slices must be at least 1, got 0"),
    ],
)
def test_an_impossible_number_of_slices_is_named(groups: list[int], slices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_on_groups([Rollout(g, range(3), 0) for g in groups], slices)


def test_shuffled_completions_are_split_on_group_boundaries() -> None:
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
