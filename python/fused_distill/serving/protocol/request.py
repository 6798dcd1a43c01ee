"""The terms that client, server and engines share: which tokens are scored, and with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

SCORE_PATH = "/get_sequence_logprobs/"
HEAD_PATH = "/v1/teacher/head"
WEIGHTS_HEADER = "x-teacher-weights"  # of every answer: the fingerprint of the teacher's weights

Response = Literal["logprobs", "hidden_states"]


def first_scored_index(prompt_length: int) -> int:
    """Return the index of the first scored token: no log-probability exists for a sequence's first token."""
    return max(prompt_length, 1)


def scored_positions(n_tokens: int, prompt_length: int) -> int:
    """Return the number of scored tokens of a sequence."""
    return max(n_tokens - first_scored_index(prompt_length), 0)


def check_request(
    sequences: Sequence[Sequence[int] | NDArray[Any]],
    prompt_lengths: Sequence[int],
    score_ids: Sequence[Sequence[Sequence[int] | NDArray[Any]]] | None,
) -> None:
    """Run the checks that client and server share.

    Raises:
        ValueError: a field is invalid (the message names it and the index).
    """
    for name, values in (("prompt_lengths", prompt_lengths), ("score_ids", score_ids)):
        if values is not None and len(values) != len(sequences):
            raise ValueError(
                f"{name} must have {len(sequences)} entries, one per sequence, got {len(values)}"
            )
    for i, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 0 <= prompt_length <= len(tokens):
            raise ValueError(
                f"prompt_lengths[{i}] must be between 0 and the sequence's {len(tokens)} tokens, "
                f"got {prompt_length}"
            )


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence to score, from token `start` to its end."""

    tokens: tuple[int, ...]
    prompt_length: int
    score_ids: NDArray[np.int32] | None = None  # (P, M)

    @property
    def start(self) -> int:
        """Index of the first scored token."""
        return first_scored_index(self.prompt_length)

    @property
    def positions(self) -> int:
        """Number of scored tokens."""
        return scored_positions(len(self.tokens), self.prompt_length)


class ScoringOptions(NamedTuple):
    """Options of a request. Only sequences with equal options share a batch."""

    top_logprobs: int  # K
    score_count: int | None  # M, or None without score_logprobs
    temperature: float
    response: Response = "logprobs"
    vocab_size: int | None = None  # the distribution is over the first vocab_size tokens; None: over all
