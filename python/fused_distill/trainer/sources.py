"""What a run or a teacher store is made from, as fingerprints: its samples, its tokenizer and its teacher."""

from __future__ import annotations

import hashlib
import json
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
    samples: Dataset, tokenizer: PreTrainedTokenizerBase, teachers: Mapping[str, Teacher]
) -> dict[str, str | None]:
    """Return the fingerprints of data, tokenizer and teachers; None if a teacher's server does not tell it.

    The key of the only teacher is "teacher", that of one named math is "teacher math".
    """
    own = {"data": _data_fingerprint(samples), "tokenizer": tokenizer_fingerprint(tokenizer)}
    return own | {f"teacher {name}".rstrip(): teacher.fingerprint for name, teacher in teachers.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings and the fingerprints that differ; empty if none does."""
    told: list[str] = []
    for key in {**before, **now}:
        kind, old, new = key.partition(" ")[0], before.get(key), now.get(key)
        if old != new and not (kind == "teacher" and None in (old, new)):
            told.append(f"{key}: {_DIFFERENCES.get(kind, f'was {old} before, is {new}')}")
    return "; ".join(told)


def _data_fingerprint(samples: Dataset) -> str:
    """Return the SHA-256 of all samples in their order, with their teachers, and of the number used."""
    table: Any = samples.data  # with the dropped samples, so that no row is copied
    whole = hashlib.sha256(json.dumps([len(samples), table.column("teacher").to_pylist()]).encode())
    for name in ("prompt", "teacher_prompt", "completion"):
        lengths, tokens = hashlib.sha256(), hashlib.sha256()  # whatever the chunks are
        for chunk in table.column(name).chunks:
            lengths.update(chunk.value_lengths().fill_null(-1).to_numpy().tobytes())
            tokens.update(chunk.flatten().to_numpy().tobytes())
        whole.update(lengths.digest() + tokens.digest())
    return whole.hexdigest()
