"""What is scored and how: the words that server, batcher and engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .logprobs import first_scored, scored_positions

Response = Literal["logprobs", "hidden_states"]


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to be scored from token `start` on."""

    tokens: tuple[int, ...]
    prompt_length: int
    score_ids: tuple[tuple[int, ...], ...] | None = None  # M per position

    @property
    def start(self) -> int:
        """The first token with a log-probability."""
        return first_scored(self.prompt_length)

    @property
    def positions(self) -> int:
        """Tokens that are scored."""
        return scored_positions(len(self.tokens), self.prompt_length)


class ScoringOptions(NamedTuple):
    """What sequences of one batch share."""

    top_logprobs: int  # K
    score_count: int | None  # M; None: no score_logprobs
    temperature: float
    response: Response = "logprobs"
    vocab_size: int | None = None  # columns of the head that are the vocabulary; None: all
