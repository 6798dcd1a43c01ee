"""The teacher's LM head as a safetensors file, served at /v1/teacher/head and cached by the client."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...huggingface.lm_head import LMHeadParams


def save_head(head: LMHeadParams, path: Path) -> str:
    """Save "weight" (V, Dt) and, if the head has one, "bias" (V,). Return the SHA-256 of the file."""
    tensors = {"weight": head.weight, "bias": head.bias}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None},
        path,
        {"lm_head_of": json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})},
    )
    return file_sha256(path)


def load_head(path: Path) -> LMHeadParams:
    """Load a file of `save_head` to the CPU.

    Raises:
        ValueError: the file is not an LM head.
    """
    try:
        with safe_open(path, "pt") as file:
            scalars = json.loads((file.metadata() or {})["lm_head_of"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            weight, bias = tensors["weight"], tensors.get("bias")
            return LMHeadParams(weight, bias, scalars["logit_scale"], scalars["softcap"])
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise ValueError(f"path must be a teacher's LM head, got {path}: {error}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class SavedHead(NamedTuple):
    """A file of `save_head` and its checksum."""

    path: Path
    sha256: str


class HeadFile:
    """A head that is saved to a temporary file on first use. Threads may share it."""

    def __init__(self, head: LMHeadParams):
        self.head = head
        self._lock = threading.Lock()
        self._folder: TemporaryDirectory[str] | None = None
        self._saved: SavedHead | None = None

    def saved(self) -> SavedHead:
        """Return the file, which exists until `close`."""
        with self._lock:
            # A cleaner of temporary folders may have removed the file.
            if self._saved is None or not self._saved.path.exists():
                self._folder = TemporaryDirectory(prefix="fused-distill-head-")
                path = Path(self._folder.name) / "head.safetensors"
                self._saved = SavedHead(path, save_head(self.head, path))
            return self._saved

    def close(self) -> None:
        """Remove the file."""
        with self._lock:
            if self._folder is not None:
                self._folder.cleanup()
