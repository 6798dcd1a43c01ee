"""Dtypes and tokenizers of models that are loaded with transformers."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import torch

_log = logging.getLogger(__name__)


def weights_dtype(name: str, device: str) -> torch.dtype:
    """Return a dtype by its name; "auto" is bfloat16, or float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, name)


def load_tokenizer(name: str) -> Any | None:
    """Return the tokenizer of a local path or hub name, or None, with a warning, if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        _log.warning("%s has no tokenizer, so clients cannot compare it with their own: %s", name, reason)
        return None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary, equal for tokenizers that give every token the same id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
