"""Models that are loaded with transformers: their weights, dtypes and tokenizers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)

_NAMED_WEIGHTS = 5  # an error message names so many weights


def require_model(name: str) -> None:
    """Raise FileNotFoundError if the name is a path, not a hub name, and no model's folder is there."""
    path = Path(name)
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{name} is no model's folder: it has no config.json")
    elif path.exists():
        raise FileNotFoundError(f"{name} must be a model's folder, but is a file")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise FileNotFoundError(f"the folder {name} does not exist")


def load_causal_lm(name: str, **options: Any) -> Any:
    """Load a causal language model; every weight must come from the checkpoint.

    transformers would fill weights that a checkpoint lacks with random numbers, e.g. the LM head of a base
    model or a classifier. Weights that are tied to others need not be in the checkpoint.

    Args:
        name: local path or hub name.
        options: further arguments of AutoModelForCausalLM.from_pretrained.

    Raises:
        OSError: there is no model of that name, or its files cannot be read.
        ValueError: it is not a causal language model, or weights are missing or have other shapes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    require_model(name)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise OSError(f"a weight file of {name} cannot be read: {error}") from error
    problems: list[str] = []
    if missing := info["missing_keys"]:
        problems.append(f"lacks the weights {_first_names(missing)}")
    if mismatched := info["mismatched_keys"]:
        shapes = (f"{key} (is {[*found]}, should be {[*expected]})" for key, found, expected in mismatched)
        problems.append(f"has weights of other shapes: {_first_names(shapes)}")
    if problems:
        raise ValueError(
            f"{name} {' and '.join(problems)}; it must be a checkpoint of a whole {type(model).__name__}"
        )
    return model


def _first_names(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = len(shown) - _NAMED_WEIGHTS
    return ", ".join(shown[:_NAMED_WEIGHTS]) + (f" and {more} more" if more > 0 else "")


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
