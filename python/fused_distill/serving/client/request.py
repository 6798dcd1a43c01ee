"""One call of the teacher client: validation, division into requests, comparison with the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.hidden_states import HiddenStates
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import check_request, first_scored_index, scored_positions
from .retry import ServerError

Ids = Sequence[int] | NDArray[Any]  # integers
ScoreIds = Sequence[Sequence[Ids] | NDArray[Any]] | NDArray[Any]

_MAX_SEQUENCES = 256  # per request
_SCORE_IDS_PER_TOKEN = 16  # so many score ids count as one token when a call is divided into requests


class TeacherError(ServerError):
    """A teacher's answer does not fit the request."""


@dataclass(frozen=True)
class ScoringRequest:
    """The fields of a request for log-probabilities, as its body names them."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    top_logprobs: int
    temperature: float
    score_ids: list[list[list[int]]] | None
    vocab_size: int | None

    @classmethod
    def create(
        cls,
        sequences: Sequence[Ids] | NDArray[Any],
        prompt_lengths: Ids,
        top_logprobs: int = 0,
        temperature: float = 1.0,
        score_ids: ScoreIds | None = None,
        vocab_size: int | None = None,
    ) -> ScoringRequest:
        """Convert and validate a caller's arguments.

        Raises:
            ValueError: an argument is invalid (the message names it and the index).
        """
        scores = None
        if score_ids is not None:
            scores = [[[int(t) for t in position] for position in positions] for positions in score_ids]
        request = cls(
            [[int(t) for t in sequence] for sequence in sequences],
            [int(length) for length in prompt_lengths],
            int(top_logprobs),
            float(temperature),
            scores,
            None if vocab_size is None else int(vocab_size),
        )
        if not request.sequences:
            raise ValueError("sequences must not be empty")
        check_request(request.sequences, request.prompt_lengths, scores)
        if request.top_logprobs < 0:
            raise ValueError(f"top_logprobs must not be negative, got {request.top_logprobs}")
        if not request.temperature > 0:
            raise ValueError(f"temperature must be positive, got {request.temperature}")
        if request.vocab_size is not None and request.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {request.vocab_size}")
        for i, tokens in enumerate(request.sequences):
            if not tokens:
                raise ValueError(f"sequences[{i}] must have at least one token, got none")
        for i, (rows, n) in enumerate(zip(scores or [], request.positions, strict=False)):
            widths = {len(ids) for ids in rows}
            if len(rows) != n or not widths <= {request.score_count}:
                raise ValueError(
                    f"score_ids[{i}] must have {n} positions of {request.score_count} ids, "
                    f"got {len(rows)} of {sorted(widths)}"
                )
        return request

    @property
    def positions(self) -> list[int]:
        """Number of scored positions per sequence."""
        return list(map(scored_positions, map(len, self.sequences), self.prompt_lengths))

    @property
    def score_count(self) -> int:
        """Number of score ids per position."""
        return next((len(ids) for scores in self.score_ids or [] for ids in scores), 0)

    def parts(self, max_tokens: int) -> Iterator[tuple[int, ScoringRequest]]:
        """Yield requests for consecutive sequences of about max_tokens; a longer sequence goes alone.

        With each comes the index, within the whole call, of its first sequence.
        """
        weight = 1 + self.score_count / _SCORE_IDS_PER_TOKEN
        cuts, tokens = [0], 0.0
        for i, sequence in enumerate(self.sequences):
            full = tokens + weight * len(sequence) > max_tokens or i - cuts[-1] >= _MAX_SEQUENCES
            if i > cuts[-1] and full:
                cuts.append(i)
                tokens = 0.0
            tokens += weight * len(sequence)
        for start, end in zip(cuts, [*cuts[1:], len(self.sequences)], strict=True):
            yield (
                start,
                replace(
                    self,
                    sequences=self.sequences[start:end],
                    prompt_lengths=self.prompt_lengths[start:end],
                    score_ids=self.score_ids and self.score_ids[start:end],
                ),
            )

    def check_answer(self, answer: TeacherLogprobs, first: int) -> None:
        """Raise a TeacherError if the answer does not fit the request or a number is missing.

        The first sequence has the index `first` within the whole call.
        """
        self._check_lengths(answer.lengths)
        scores = answer.score_logprobs
        widths = (answer.logprobs.shape[1], None if scores is None else scores.shape[1])
        expected = (self.top_logprobs, None if self.score_ids is None else self.score_count)
        if len(answer.actual_logprobs) and widths != expected:
            raise TeacherError(
                f"the answer has (K, M) = {widths} log-probabilities per position, expected {expected}"
            )
        for i, (part, prompt_length) in enumerate(zip(answer.split(), self.prompt_lengths, strict=True)):
            missing = np.isnan(part.actual_logprobs) | np.isnan(part.logprobs).any(-1)
            if self.top_logprobs:
                missing |= part.logprobs[:, 0] == -np.inf
            if part.score_logprobs is not None:
                missing |= np.isnan(part.score_logprobs).any(-1)
            if missing.any():
                token = first_scored_index(prompt_length) + int(missing.argmax())
                raise TeacherError(f"the answer has no number for sequence {first + i} at token {token}")

    def check_hidden_states(self, hidden: HiddenStates, first: int) -> None:
        """Check hidden states as `check_answer` checks log-probabilities."""
        self._check_lengths(hidden.lengths)
        for i, part in enumerate(hidden.split(), first):
            if not part.valid:
                raise TeacherError(f"the answer has a hidden state that is not finite in sequence {i}")

    def _check_lengths(self, lengths: NDArray[np.int64]) -> None:
        if lengths.tolist() != self.positions:
            raise TeacherError(f"the answer has {lengths.tolist()} positions, expected {self.positions}")
