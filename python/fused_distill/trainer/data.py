"""Prompts and completions as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import ConfigError, TrainConfig


class Prompt(NamedTuple):
    """One row of the data."""

    row: int
    tokens: list[int]
    completion: list[int] | None  # the data's own


class Sample(NamedTuple):
    """A prompt with one completion."""

    row: int
    prompt: list[int]
    completion: list[int]
    truncated: bool = False  # by max_completion_length


@dataclass(frozen=True)
class Batch:
    """Samples, right-padded to a rectangle."""

    samples: list[Sample]
    tokens: Tensor  # (B, T) int64
    attention: Tensor  # (B, T) int64, 0 at padding
    mask: Tensor  # (B, T - 1) bool, True where the next token belongs to a completion

    @classmethod
    def of(cls, samples: list[Sample], device: torch.device) -> Batch:
        """At least one sample."""
        rows = [torch.tensor([*s.prompt, *s.completion]) for s in samples]
        ends = torch.tensor([[len(row)] for row in rows])
        starts = torch.tensor([[len(s.prompt)] for s in samples])
        tokens = pad_sequence(rows, batch_first=True)
        index = torch.arange(tokens.shape[1])
        mask = (index >= starts - 1) & (index < ends - 1)
        return cls(samples, tokens.to(device), (index < ends).long().to(device), mask[:, :-1].to(device))


def load_prompts(config: TrainConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out ones.

    Raises:
        ConfigError: the data cannot be read, lacks a column, or is too small for the run.
    """
    data = config.data
    suffix = Path(data.path).suffix.lower()
    try:
        if suffix in (".jsonl", ".json", ".parquet"):
            kind = "parquet" if suffix == ".parquet" else "json"
            rows = load_dataset(kind, data_files=data.path, split="train")
        else:
            rows = load_dataset(data.path, split=data.split)
    except Exception as error:  # datasets raises whatever its readers raise
        raise ConfigError(f"data.path: {data.path} cannot be read: {error}") from error
    assert isinstance(rows, Dataset)
    if not {"prompt", "messages"} & set(rows.column_names):
        raise ConfigError(f"data.path: rows must have prompt or messages, got {rows.column_names}")
    if config.lmbda < 1 and "completion" not in rows.column_names:
        raise ConfigError("lmbda: below 1 the data must have completion, which it has not")
    found = [_prompt(i, row, tokenizer, config) for i, row in enumerate(rows)]
    kept = [prompt for prompt in found if 0 < len(prompt.tokens) <= data.max_prompt_length]
    training, held_out = kept, kept[len(kept) - data.evaluation_prompts :]
    if data.evaluation_prompts:
        training = kept[: -data.evaluation_prompts]
    if len(training) < config.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step: {config.prompts_per_step} is more than the {len(training)} prompts left for "
            f"training of {len(found)} rows"
        )
    return training, held_out


def _prompt(index: int, row: Any, tokenizer: Any, config: TrainConfig) -> Prompt:
    if row.get("messages") is not None:
        tokens = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        tokens = tokenizer(row["prompt"])["input_ids"]
    text, completion = row.get("completion"), None
    if text is not None:
        completion = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            completion = [*completion, tokenizer.eos_token_id]
        completion = completion[: config.rollouts.max_completion_length]
    return Prompt(index, list(tokens), completion)


def order(prompts: list[Prompt], seed: int, start: int) -> Iterator[Prompt]:
    """The prompts from position `start` on, epoch after epoch, each in an order of its own."""
    for epoch in range(start // len(prompts), 1 << 62):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for i in torch.randperm(len(prompts), generator=generator).tolist()[start % len(prompts) :]:
            yield prompts[i]
        start = 0
