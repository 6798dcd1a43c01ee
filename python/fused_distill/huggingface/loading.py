"""Models that are loaded with transformers: their weights, dtypes and tokenizers."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from .fingerprint import local_checkpoint, tensor_shapes

_log = logging.getLogger(__name__)

_NAMED_WEIGHTS = 5  # an error message names so many weights
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "tekken.json")
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
_tokenizers: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by the SHA-256 of their files
_fingerprints: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()  # with the number of tokens


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


def load_files(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Call a from_pretrained, and name the file of the model that it cannot read, e.g. as it is truncated.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        return load(name, **options)
    except Exception as error:  # transformers and the formats' libraries raise many types
        problem = find_broken_file(name)
        if problem is None and isinstance(
            error, OSError | ValueError | ImportError | RuntimeError | MemoryError
        ):
            if isinstance(error, OSError) and local_checkpoint(name) is None:
                raise OSError(
                    f"there is no folder {name}, and loading it from the hub failed: {error}"
                ) from error
            raise
        reason = f"the files of {name} cannot be read: {type(error).__name__}: {error}"
        raise OSError(problem or reason) from error


def find_broken_file(name: str) -> str | None:
    """Return what is wrong with the files of a model on this machine, or None if nothing was found.

    Of weights only the header and the size of each file are read.
    """
    if (problem := find_broken_weights(name)) is not None:
        return problem
    folder = local_checkpoint(name)
    for path in [] if folder is None else sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            return f"{path} is no JSON, it may be truncated: {error}"
    return None


def find_broken_weights(name: str) -> str | None:
    """Return what is wrong with the headers or sizes of a model's weight files on this machine, or None."""
    folder = local_checkpoint(name)
    try:
        if folder is not None and not tensor_shapes(folder):
            broken = (path for path in sorted(folder.glob("*.bin")) if not zipfile.is_zipfile(path))
            return next((f"{path} is no file of torch.save, it may be truncated" for path in broken), None)
    except json.JSONDecodeError as error:
        return f"{folder}: the index of the weights is no JSON, it may be truncated: {error}"
    except (ValueError, LookupError, TypeError) as error:
        return str(error) if isinstance(error, ValueError) else f"{folder} has an index without weight_map"
    return None


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
    from transformers import AutoModelForCausalLM

    require_model(name)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_files(AutoModelForCausalLM.from_pretrained, name, **options)
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
    try:
        return read_tokenizer(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        _log.warning("%s has no tokenizer, so clients cannot compare it with their own: %s", name, reason)
        return None


def find_tokenizer(name: str) -> Any | None:
    """Return the tokenizer of a local path or hub name, or None if it has none."""
    with suppress(OSError, ValueError):
        return read_tokenizer(name)
    return None


def read_tokenizer(name: str) -> Any:
    """Return the tokenizer of a local path or hub name; models with equal tokenizer files share one.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = local_checkpoint(name)
    files = {path for pattern in _TOKENIZER_FILES for path in (folder.glob(pattern) if folder else ())}
    if not files and Path(name).is_dir():  # for some models transformers would make one without a vocabulary
        saved = f"AutoTokenizer.from_pretrained(NAME).save_pretrained({name!r})"
        raise FileNotFoundError(f"{name} has no tokenizer: save that of its model there, {saved}")
    files |= {path for pattern in _TEMPLATE_FILES for path in (folder.glob(pattern) if folder else ())}
    contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(files)]
    tokenizer = _tokenizers.get(str(contents))
    if tokenizer is None:
        tokenizer = load_files(AutoTokenizer.from_pretrained, name)
        if contents:
            _tokenizers[str(contents)] = tokenizer
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary, equal for tokenizers that give every token the same id."""
    size, fingerprint = _fingerprints.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()
        _fingerprints[tokenizer] = len(tokenizer), fingerprint
    return fingerprint


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return the SHA-256 of all that decides how a tokenizer encodes and renders; None if it is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = [type(tokenizer).__name__, tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    return hashlib.sha256((backend.to_str() + json.dumps(rules)).encode()).hexdigest()
