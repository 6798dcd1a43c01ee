"""The interface between the server and whatever scores sequences."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from ..protocol.hidden_states import HiddenStates
from ..protocol.lm_head import HeadFile
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import ScoringOptions, TokenSequence

Result = TeacherLogprobs | HiddenStates
Results = list[TeacherLogprobs] | list[HiddenStates]
Capability = Literal["temperature", "score_ids", "vocab_size", "hidden_states"]


class TeacherInfo(NamedTuple):
    """Description of a teacher for clients."""

    model: str
    vocab_size: int
    max_length: int
    tokenizer_fingerprint: str | None
    capabilities: tuple[Capability, ...] = ("temperature", "score_ids", "vocab_size")  # beyond top log-probs
    weights_fingerprint: str | None = None  # the same on every server with the same weights


class TeacherEngine(Protocol):
    """Score one batch at a time, always from the same thread; any thread may read `head_file`."""

    info: TeacherInfo
    dtype: str  # of the weights, e.g. "bfloat16"
    device: str  # e.g. "cuda:0"

    @property
    def head_file(self) -> HeadFile | None:
        """The LM head; None without the capability "hidden_states"."""
        ...

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> Results:
        """Return one result per sequence, of the kind that `options.response` names."""
        ...

    def close(self) -> None:
        """Release processes and files."""
        ...


def try_engine(engine: TeacherEngine) -> None:
    """Score a few tokens, so that an engine whose model cannot do that never becomes healthy.

    Raises:
        ValueError: the engine failed, or gave numbers that are no log-probabilities.
    """
    info = engine.info
    tokens = tuple(i % info.vocab_size for i in range(min(4, info.max_length)))
    try:
        (answer,) = engine.score([TokenSequence(tokens, 1)], ScoringOptions(1, None, 1.0))
    except Exception as error:  # every engine and model family fails in its own way
        raise ValueError(f"{info.model} cannot score tokens: {type(error).__name__}: {error}") from error
    if not answer.valid or answer.lengths.tolist() != [len(tokens) - 1]:
        raise ValueError(f"{info.model} gives NaN, infinity or too few numbers for the tokens {[*tokens]}")
