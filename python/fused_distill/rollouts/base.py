"""Completions, sampling options and the interface of rollout engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, NamedTuple, Protocol


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Raises:
        ValueError: a field is invalid (the message names it).
    """

    n: int = 1  # completions per prompt
    max_tokens: int = 128
    temperature: float = 1.0  # 0: greedy, so that all n completions are the same
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # end a completion, beside the model's own end-of-sequence tokens
    vocab_size: int | None = None  # tokens from here on are never sampled; None: all rows of the LM head

    def __post_init__(self) -> None:
        for name, minimum in (("n", 1), ("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")


class Completion(NamedTuple):
    """One completion. The completions of one prompt share its group and may come in any order.

    Log-probabilities are taken before temperature, top_p and top_k, over the tokens below
    `Sampling.vocab_size` (by vLLM: over all tokens).
    """

    group: int
    prompt: list[int]
    tokens: list[int]  # including the end-of-sequence token, if there is one
    logprobs: list[float]  # per token, by the model itself, see below
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    """A source of completions."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """Return n completions per prompt, prompt by prompt.

        Args:
            prompts: token ids, at least one per prompt.
            sampling: see Sampling.
            groups: group id of each prompt. None: the prompt's position.

        Raises:
            ValueError: prompts or groups are invalid (the message names the index).
        """
        ...


def checked_prompts(
    prompts: Sequence[Sequence[int]], groups: Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    """Return prompts and groups as lists of int, validated as `RolloutEngine.generate` describes."""
    rows = [_integers(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"groups must have {len(rows)} entries, one per prompt, got {len(groups)}")
    return rows, list(range(len(rows))) if groups is None else _integers("groups", groups)


def _integers(name: str, values: Sequence[Any]) -> list[int]:
    numbers: list[int] = []
    for i, value in enumerate(values):
        try:
            numbers.append(index(value))
        except TypeError:
            raise ValueError(f"{name}[{i}] must be an int, got {value!r}") from None
    return numbers
