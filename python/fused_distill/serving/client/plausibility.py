"""Find log-probabilities that no teacher can give, e.g. probabilities whose sum is above 1."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..protocol.logprobs import TeacherLogprobs

_ROUNDING = 1e-3  # by which log-probabilities may exceed 0, and sums of probabilities 1


def implausible_positions(
    answer: TeacherLogprobs, vocab_size: int | None
) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """Yield, for each rule, the positions (P,) that break it and what is wrong there.

    Args:
        answer: log-probabilities without NaN.
        vocab_size: number of tokens that the teacher knows. None: unknown.
    """
    for name in ("logprobs", "actual_logprobs", "score_logprobs"):
        values = answer.arrays().get(name)
        if values is not None:
            above: NDArray[np.bool_] = values > _ROUNDING
            yield _anywhere(above), "a log-probability above 0"
    sums = np.exp(answer.logprobs, dtype=np.float64).sum(-1)
    yield sums > 1 + _ROUNDING, "probabilities whose sum is above 1"
    present = answer.logprobs > -np.inf
    absent_ids = -1 - np.arange(answer.ids.shape[1])  # all different
    yield _anywhere(present & (answer.ids < 0)), "a negative token id"
    ordered = np.sort(np.where(present, answer.ids, absent_ids), axis=-1)
    yield _anywhere(np.diff(ordered, axis=-1) == 0), "a token twice"
    if vocab_size is not None:
        beyond = present & (answer.ids >= vocab_size)
        yield _anywhere(beyond), f"a token id beyond the vocabulary of {vocab_size} tokens"


def _anywhere(entries: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the positions (P,) with an entry that is True."""
    return np.asarray(np.any(entries, axis=tuple(range(1, entries.ndim))))
