"""The rollouts of one gradient-accumulation cycle, cut into slices between groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar


class Rollout(Protocol):
    """What is needed of a completion; `fused_distill.serving.rollouts.Completion` has it."""

    @property
    def group(self) -> int:
        """Shared by the completions of one prompt."""
        ...

    @property
    def tokens(self) -> Sized:
        """The completion's tokens."""
        ...


R = TypeVar("R", bound=Rollout)


def split_on_groups(rollouts: Sequence[R], slices: int) -> list[list[R]]:
    """Slices of about as many tokens each, none of which divides a group.

    Groups go, the largest first, to the slice with the fewest tokens so far: the largest slice has at most
    4/3 of the tokens of the best division (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    Which groups share a slice does not depend on the order of the rollouts; within a slice it is kept.

    Args:
        rollouts: of a whole cycle, in any order; those of a group need not be neighbours.
        slices: steps of gradient accumulation.

    Returns:
        `slices` lists, none empty. Every rollout is in one of them.

    Raises:
        ValueError: fewer than one slice, or fewer groups than slices.
    """
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    tokens: Counter[int] = Counter()
    for rollout in rollouts:
        tokens[rollout.group] += len(rollout.tokens)
    if len(tokens) < slices:
        raise ValueError(f"rollouts must have at least {slices} groups, one a slice, got {len(tokens)}")
    # Tokens, groups, slice: an empty slice comes before one whose groups have no tokens.
    loads = [(0, 0, i) for i in range(slices)]
    owner: dict[int, int] = {}
    for group in sorted(tokens, key=lambda g: (-tokens[g], g)):
        load, groups, owner[group] = min(loads)
        loads[owner[group]] = (load + tokens[group], groups + 1, owner[group])
    return [[r for r in rollouts if owner[r.group] == i] for i in range(slices)]
