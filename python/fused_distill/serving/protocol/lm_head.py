"""A teacher's head as a file: what `/v1/teacher/head` serves and the client keeps."""

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
    """Write it as safetensors: "weight" (V, Dt), "bias" (V,) if there is one; returns the file's SHA-256."""
    tensors = {"weight": head.weight, "bias": head.bias}
    rest = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None},
        path,
        {"lm_head_of": json.dumps(rest)},
    )
    return file_sha256(path)


class SavedHead(NamedTuple):
    """A file of `save_head`."""

    path: Path
    sha256: str


class HeadFile:
    """A head that is written to a temporary file when it is first asked for. Threads may share it."""

    def __init__(self, head: LMHeadParams):
        self.head = head
        self._lock = threading.Lock()
        self._folder: TemporaryDirectory[str] | None = None
        self._saved: SavedHead | None = None

    def saved(self) -> SavedHead:
        """The file, which stays until `close`."""
        with self._lock:
            # Whoever cleans temporary folders may have taken the file.
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
            self._folder = self._saved = None


def load_head(path: Path, device: str = "cpu") -> LMHeadParams:
    """The head of `save_head`.

    Raises:
        ValueError: the file holds none.
    """
    try:
        with safe_open(path, "pt", device=device) as file:
            rest = json.loads((file.metadata() or {})["lm_head_of"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return LMHeadParams(tensors["weight"], tensors.get("bias"), rest["logit_scale"], rest["softcap"])
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise ValueError(f"path must be a teacher's head, got {path}: {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
