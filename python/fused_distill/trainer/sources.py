"""What a run or a teacher store is made from, as fingerprints: its samples, its tokenizer and its teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..huggingface.loading import tokenizer_fingerprint
from .targets import Teacher

_DIFFERENCES = {
    "data": "other prompts or completions than before",
    "tokenizer": "gives tokens other ids than before",
    "teacher": "other weights than before",
}


def fingerprints(
    samples: Dataset, tokenizer: PreTrainedTokenizerBase, teacher: Teacher
) -> dict[str, str | None]:
    """Return the fingerprints of data, tokenizer and teacher; None if a teacher's server does not tell it."""
    return {
        "data": _data_fingerprint(samples),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "teacher": teacher.fingerprint,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings and the fingerprints that differ; empty if none does."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if None in (before.get("teacher"), now.get("teacher")):
        changed = [key for key in changed if key != "teacher"]
    told = (f"was {before.get(key)} before, is {now.get(key)}" for key in changed)
    return "; ".join(f"{key}: {_DIFFERENCES.get(key, text)}" for key, text in zip(changed, told, strict=True))


def _data_fingerprint(samples: Dataset) -> str:
    """Return the SHA-256 of all prompts and completions in their order, and of the number of samples used."""
    table: Any = samples.data  # with the dropped samples, so that no row is copied
    whole = hashlib.sha256(str(len(samples)).encode())
    for name in ("prompt", "completion"):
        lengths, tokens = hashlib.sha256(), hashlib.sha256()  # whatever the chunks are
        for chunk in table.column(name).chunks:
            lengths.update(chunk.value_lengths().to_numpy().tobytes())
            tokens.update(chunk.flatten().to_numpy().tobytes())
        whole.update(lengths.digest() + tokens.digest())
    return whole.hexdigest()
