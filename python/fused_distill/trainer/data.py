"""Prompts and completions as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, Sequence, Value, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import ConfigError, DataConfig, TrainConfig


class Sample(NamedTuple):
    """A prompt and a completion: the data's own, or the student's."""

    row: int  # of the data
    prompt: list[int]
    completion: list[int]
    truncated: bool = False  # by max_completion_length

    @property
    def tokens(self) -> list[int]:
        """Both."""
        return [*self.prompt, *self.completion]


_TOKENS = Sequence(Value("int32"))
_FEATURES = Features(
    row=Value("int64"), prompt=_TOKENS, completion=_TOKENS, truncated=Value("bool")
)  # of a Sample


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
        rows = [torch.tensor(s.tokens) for s in samples]
        ends = torch.tensor([[len(row)] for row in rows])
        starts = torch.tensor([[len(s.prompt)] for s in samples])
        tokens = pad_sequence(rows, batch_first=True)
        index = torch.arange(tokens.shape[1])
        mask = (index >= starts - 1) & (index < ends - 1)
        return cls(samples, tokens.to(device), (index < ends).long().to(device), mask[:, :-1].to(device))


def load_data(config: TrainConfig, tokenizer: Any, completions: bool) -> tuple[Dataset, list[Sample]]:
    """Samples for training, as rows with a Sample's fields in mapped files, and held-out ones.

    Tokens are kept by `datasets`' cache, so that a second run or process does not make them again.

    Raises:
        ConfigError: the data cannot be read, is too small for the run, or a row lacks its prompt or, where
            `completions` are needed, its completion.
    """
    rows, longest = _rows(config.data), config.data.max_prompt_length
    how = {
        "tokenizer": tokenizer,
        "longest": config.rollouts.max_completion_length,
        "completions": completions,
    }
    found = rows.map(
        _sample,
        with_indices=True,
        fn_kwargs=how,
        remove_columns=rows.column_names,
        features=_FEATURES,
    )
    kept = found.filter(lambda prompt: 0 < len(prompt) <= longest, input_columns=["prompt"])
    split = max(len(kept) - config.data.evaluation_prompts, 0)
    if split < config.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step: {config.prompts_per_step} is more than the {split} prompts left for "
            f"training of {len(found)} rows"
        )
    return kept.select(range(split)), [Sample(**kept[i]) for i in range(split, len(kept))]


def _rows(data: DataConfig) -> Dataset:
    suffix = Path(data.path).suffix.lower()
    try:
        if suffix in (".jsonl", ".json", ".parquet"):
            kind = "parquet" if suffix == ".parquet" else "json"
            return load_dataset(kind, data_files=data.path, split="train")
        return load_dataset(data.path, data.name, split=data.split)
    except Exception as error:  # datasets raises whatever its readers raise
        raise ConfigError(f"data.path: {data.path} cannot be read: {error}") from error


def _sample(row: Any, index: int, **how: Any) -> dict[str, Any]:
    try:
        return _tokenized(row, index, **how)._asdict()
    except Exception as error:  # tokenizers and their templates raise what they like
        raise ConfigError(f"data.path: row {index} {error}") from error


def _tokenized(row: Any, index: int, tokenizer: Any, longest: int, completions: bool) -> Sample:
    messages, completion = row.get("messages"), row.get("completion")
    if messages:
        if messages[-1]["role"] == "assistant":
            if completion is not None:
                raise ValueError("must have a completion or messages that end with the assistant's, not both")
            *messages, answer = messages
            completion = answer["content"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    elif row.get("prompt") is not None:
        prompt = tokenizer(row["prompt"])["input_ids"]
    else:
        raise ValueError(f"must have prompt or messages, got {', '.join(row)}")
    tokens = []
    if completion is not None:
        tokens = tokenizer(completion, add_special_tokens=False)["input_ids"]
        tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    elif completions:
        raise ValueError("must have a completion (lmbda below 1, or a stored teacher)")
    return Sample(index, list(prompt), tokens[:longest], len(tokens) > longest)


def order(samples: Any, seed: int, start: int) -> Iterator[Sample]:
    """The samples of `load_data` from position `start` on, epoch after epoch, each in an order of its own."""
    for epoch in range(start // len(samples), 1 << 62):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for i in torch.randperm(len(samples), generator=generator).tolist()[start % len(samples) :]:
            yield Sample(**samples[i])
        start = 0
