"""Rollouts of one gradient-accumulation cycle, split into balanced slices without splitting a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar


class Rollout(Protocol):
    """The members of a completion that are used here, e.g. of `fused_distill.rollouts.base.Completion`."""

    @property
    def group(self) -> int:
        """Id shared by the completions of one prompt."""
        ...

    @property
    def tokens(self) -> Sized:
        """Tokens of the completion."""
        ...


R = TypeVar("R", bound=Rollout)


def split_on_groups(rollouts: Sequence[R], slices: int) -> list[list[R]]:
    """Split rollouts into slices with about equal numbers of tokens, none of which divides a group.

    Groups are assigned largest first, each to the slice with the fewest tokens so far. The largest slice then
    has at most 4/3 of the tokens of the best division (Graham, Bounds on Multiprocessing Timing Anomalies,
    1969). The order of the rollouts does not matter, and it is kept within a slice.

    Args:
        rollouts: rollouts of a whole cycle, in any order; the rollouts of a group need not be neighbours.
        slices: number of gradient-accumulation steps.

    Returns:
        `slices` lists, none empty. Every rollout is in exactly one of them.

    Raises:
        ValueError: slices is less than 1 or more than the number of groups.
    """
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    tokens: Counter[int] = Counter()
    for rollout in rollouts:
        tokens[rollout.group] += len(rollout.tokens)
    if len(tokens) < slices:
        raise ValueError(f"rollouts must have at least {slices} groups, one per slice, got {len(tokens)}")
    # (tokens, groups, slice): between slices without tokens, the one with fewer groups comes first.
    loads = [(0, 0, i) for i in range(slices)]
    slice_of: dict[int, int] = {}
    for group in sorted(tokens, key=lambda g: (-tokens[g], g)):
        load, n_groups, i = min(loads)
        slice_of[group] = i
        loads[i] = (load + tokens[group], n_groups + 1, i)
    return [[r for r in rollouts if slice_of[r.group] == i] for i in range(slices)]
