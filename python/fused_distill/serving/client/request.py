"""One call of the teacher client: validation, division into requests, comparison with the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..protocol.hidden_states import HiddenDtype, HiddenStates
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import check_request, first_scored_index, scored_positions
from .arguments import elements, positive_number, token_ids, whole_number, whole_numbers
from .plausibility import implausible_positions
from .session import ServerError

Ids = Sequence[int] | NDArray[Any]  # integers
ScoreIds = Sequence[Sequence[Ids] | NDArray[Any]] | NDArray[Any]

_MAX_SEQUENCES = 256  # per request
_SCORE_IDS_PER_TOKEN = 16  # so many score ids count as one token when a call is divided into requests
_HEADER_BYTES = 64 << 10  # of a response, besides its numbers
_JSON_ENTRY_BYTES = 512  # of a token in a stock server's response: id, text, log-probability and rank


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
            scores = [
                [
                    token_ids(f"score_ids[{i}][{j}]", ids)
                    for j, ids in enumerate(elements(f"score_ids[{i}]", rows, "positions"))
                ]
                for i, rows in enumerate(elements("score_ids", score_ids, "sequences"))
            ]
        rows = enumerate(elements("sequences", sequences, "sequences"))
        request = cls(
            [token_ids(f"sequences[{i}]", sequence) for i, sequence in rows],
            whole_numbers("prompt_lengths", prompt_lengths, "whole numbers"),
            whole_number("top_logprobs", top_logprobs, at_least=0),
            positive_number("temperature", temperature),
            scores,
            None if vocab_size is None else whole_number("vocab_size", vocab_size, at_least=1),
        )
        if not request.sequences:
            raise ValueError("sequences must not be empty")
        check_request(request.sequences, request.prompt_lengths, scores)
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

    @property
    def binary_bytes(self) -> int:
        """Largest size of a binary response with log-probabilities."""
        width = (
            1 + 2 * self.top_logprobs + self.score_count
        )  # of 4 bytes: ids have as many as log-probabilities
        return 4 * (len(self.sequences) + sum(self.positions) * width) + _HEADER_BYTES

    def json_bytes(self, scores: int = 0) -> int:
        """Return the largest size of a stock server's response, with the tokens of the prompts and scores."""
        entries = sum(map(len, self.sequences)) * (1 + max(self.top_logprobs, 1)) + scores
        return _JSON_ENTRY_BYTES * entries + _HEADER_BYTES * len(self.sequences)

    def hidden_bytes(self, hidden_size: int, dtype: HiddenDtype) -> int:
        """Largest size of a binary response with hidden states."""
        numbers = sum(self.positions) * hidden_size
        return 4 * len(self.sequences) + numbers * (4 if dtype == "float32" else 2) + _HEADER_BYTES

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

    def check_answer(self, answer: TeacherLogprobs, first: int, vocab_size: int | None) -> None:
        """Raise a TeacherError if the answer does not fit the request or a number is missing or impossible.

        The first sequence has the index `first` within the whole call. A vocab_size of None is unknown.
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
            faults = chain([(missing, "no number")], implausible_positions(part, vocab_size))
            for positions, reason in faults:
                if positions.any():
                    token = first_scored_index(prompt_length) + int(positions.argmax())
                    raise TeacherError(f"the answer has {reason} for sequence {first + i} at token {token}")

    def check_hidden_states(
        self, hidden: HiddenStates, first: int, hidden_size: int, dtype: HiddenDtype
    ) -> None:
        """Check hidden states as `check_answer` checks log-probabilities."""
        self._check_lengths(hidden.lengths)
        got, expected = (hidden.states.shape[1], hidden.states.dtype), (hidden_size, getattr(torch, dtype))
        if got != expected:
            raise TeacherError(f"the answer has hidden states of size and dtype {got}, expected {expected}")
        for i, part in enumerate(hidden.split(), first):
            if not part.valid:
                raise TeacherError(f"the answer has a hidden state that is not finite in sequence {i}")

    def _check_lengths(self, lengths: NDArray[np.int64]) -> None:
        if lengths.tolist() != self.positions:
            raise TeacherError(f"the answer has {lengths.tolist()} positions, expected {self.positions}")
