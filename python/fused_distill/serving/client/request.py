"""One call of the teacher client: checked before it is sent, cut into requests, compared with its answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol import logprobs as wire
from ..protocol.hidden_states import HiddenStates
from ..protocol.logprobs import TeacherLogprobs
from .retry import ServerError

Ids = Sequence[int] | NDArray[Any]  # of integers

_REQUEST_SEQUENCES = 256
_SCORE_IDS_PER_TOKEN = 16  # so many score ids weigh as much as a token when a call is cut into requests


class TeacherError(ServerError):
    """A teacher's answer that is not one to the question asked."""


@dataclass(frozen=True)
class ScoringRequest:
    """Sequences and what is wanted of them, until `deadline` of time.monotonic()."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    top_logprobs: int
    temperature: float
    score_ids: list[list[list[int]]] | None
    vocab_size: int | None
    deadline: float

    @classmethod
    def of(
        cls,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        top_logprobs: int,
        temperature: float,
        score_ids: Sequence[Sequence[Ids] | NDArray[Any]] | NDArray[Any] | None,
        vocab_size: int | None,
        seconds: float,
    ) -> ScoringRequest:
        """From a caller's arguments. Raises ValueError naming the one that does not fit, and its index."""
        asked = cls(
            [[int(t) for t in s] for s in sequences],
            [int(p) for p in prompt_lengths],
            int(top_logprobs),
            float(temperature),
            None
            if score_ids is None
            else [[[int(t) for t in position] for position in own] for own in score_ids],
            None if vocab_size is None else int(vocab_size),
            time.monotonic() + seconds,
        )
        asked._check()
        return asked

    def _check(self) -> None:
        if not self.sequences:
            raise ValueError("sequences must not be empty")
        wire.check_request(self.sequences, self.prompt_lengths, self.score_ids)
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs must not be negative, got {self.top_logprobs}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        for i, tokens in enumerate(self.sequences):
            if len(tokens) < 1:
                raise ValueError(f"sequences[{i}] must have at least one token, got none")
        if self.score_ids is None:
            return
        for i, (own, positions) in enumerate(zip(self.score_ids, self.positions, strict=True)):
            if len(own) != positions or any(len(ids) != self.score_count for ids in own):
                raise ValueError(
                    f"score_ids[{i}] must have {positions} positions of {self.score_count} ids, "
                    f"got {len(own)} of {sorted({len(ids) for ids in own})}"
                )

    @property
    def positions(self) -> list[int]:
        """Of each sequence."""
        lengths = zip(self.sequences, self.prompt_lengths, strict=True)
        return [wire.scored_positions(len(tokens), prompt_length) for tokens, prompt_length in lengths]

    @property
    def score_count(self) -> int:
        """M."""
        rows = itertools.chain.from_iterable(self.score_ids or [])
        return len(next(rows, []))

    def parts(self, most_tokens: int) -> list[range]:
        """Consecutive sequences of about most_tokens each; a longer sequence goes alone."""
        weight = 1 + self.score_count / _SCORE_IDS_PER_TOKEN
        parts: list[range] = []
        start, tokens = 0, 0.0
        for i, sequence in enumerate(self.sequences):
            full = tokens + weight * len(sequence) > most_tokens or i - start >= _REQUEST_SEQUENCES
            if i > start and full:
                parts.append(range(start, i))
                start, tokens = i, 0.0
            tokens += weight * len(sequence)
        parts.append(range(start, len(self.sequences)))
        return parts

    def part(self, indices: range) -> ScoringRequest:
        """The same of these sequences."""
        scores = None if self.score_ids is None else [self.score_ids[i] for i in indices]
        sequences = [self.sequences[i] for i in indices]
        prompts = [self.prompt_lengths[i] for i in indices]
        return replace(self, sequences=sequences, prompt_lengths=prompts, score_ids=scores)

    def check_answer(self, answer: TeacherLogprobs, first: int) -> None:
        """The answer covers what was asked and lacks no number; `first` is its first sequence's index."""
        self._check_lengths(answer.lengths)
        scores = answer.score_logprobs
        widths = (answer.logprobs.shape[1], None if scores is None else scores.shape[1])
        expected = (self.top_logprobs, None if self.score_ids is None else self.score_count)
        if len(answer.actual_logprobs) and widths != expected:
            raise TeacherError(f"the answer has {widths} log-probabilities a position, expected {expected}")
        for i, (part, prompt_length) in enumerate(zip(answer.split(), self.prompt_lengths, strict=True)):
            missing = ~np.isfinite(part.actual_logprobs) | np.isnan(part.logprobs).any(-1)
            if self.top_logprobs:
                missing |= part.logprobs[:, 0] == -np.inf
            if part.score_logprobs is not None:
                missing |= np.isnan(part.score_logprobs).any(-1)
            if missing.any():
                position = wire.first_scored(prompt_length) + int(missing.argmax())
                raise TeacherError(f"the answer has no number for sequence {first + i} at token {position}")

    def check_hidden_states(self, hidden: HiddenStates, first: int) -> None:
        """The same of hidden states."""
        self._check_lengths(hidden.lengths)
        for i, part in enumerate(hidden.split()):
            if not part.valid:
                raise TeacherError(f"the answer has no number somewhere in sequence {first + i}")

    def _check_lengths(self, lengths: NDArray[np.int64]) -> None:
        if lengths.tolist() != self.positions:
            raise TeacherError(f"the answer has {lengths.tolist()} positions, expected {self.positions}")
