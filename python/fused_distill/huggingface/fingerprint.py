"""Fingerprints of a model's weights, which tell one checkpoint from another without reading all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.dtensor import gather_dtensor

_ROWS, _COLUMNS = 8, 64  # sampled of each tensor
_DIGITS = 32


def model_fingerprint(model: Any) -> str:
    """Return a fingerprint of a model's parameters: their names, their shapes and a sample of each.

    The sample, up to 512 numbers of a tensor, is rounded to bfloat16. A bfloat16 checkpoint therefore has the
    same fingerprint whether it was loaded to bfloat16 or float32, on any device. In float16 numbers below
    6e-5 lose bits, and the fingerprint may differ.

    Args:
        model: a transformers model or another module. All processes of an FSDP2 model call this together.

    Returns:
        32 hexadecimal digits.
    """
    return _fingerprint(model.named_parameters())


def checkpoint_fingerprint(folder: Path) -> str | None:
    """Return a fingerprint of the safetensors files in a folder, or None if there are none.

    It equals `model_fingerprint` of the model if transformers neither renames nor ties its weights.
    """
    paths = weight_files(folder)
    return _fingerprint(_tensors(paths)) if paths else None


def local_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a local path, or of a hub name in huggingface_hub's cache; None if neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):  # not installed, not in the cache, not a hub name
        return None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from a folder.

    A folder may hold the same weights a second time, e.g. in Mistral's own format.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a folder's safetensors files, reading only their headers.

    Raises:
        ValueError: a file is not a whole safetensors file (the message names it).
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return shapes


def _tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)  # of a mapped file: only what is used is read


@torch.no_grad()
def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digests: list[tuple[str, str]] = []
    for name, part in tensors:
        tensor = gather_dtensor(part).detach()
        numbers = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        rows = numbers.reshape(-1, max(1, numbers.shape[-1]) if numbers.ndim else 1)
        index = torch.linspace(0, max(len(rows) - 1, 0), min(_ROWS, len(rows))).long()
        columns = rows[:, :: max(1, rows.shape[1] // _COLUMNS)]
        sample = columns[index.to(rows.device)].to("cpu", torch.bfloat16).contiguous()
        digest = hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()
        digests.append((name, f"{[*tensor.shape]} {digest}"))
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()[:_DIGITS]
