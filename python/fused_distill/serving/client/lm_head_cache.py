"""Cache of downloaded LM heads, one file per checksum."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import httpx

from ...huggingface.lm_head import LMHeadParams
from ..protocol.lm_head import file_sha256, load_head
from ..protocol.request import HEAD_PATH
from .retry import RetryingClient


def cached_head(http: RetryingClient, deadline: float, folder: Path | None) -> tuple[LMHeadParams, str]:
    """Return the server's head and its SHA-256; download it if the folder lacks it or has it damaged.

    Args:
        http: the server.
        deadline: of time.monotonic().
        folder: the cache. None: fused-distill under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ServerError: no server gave the head in time.
    """
    sha256 = http.send("HEAD", HEAD_PATH, deadline, _etag)
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
    path = folder / f"head-{sha256}.safetensors"
    if not path.exists() or file_sha256(path) != sha256:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, delete=False) as file:
            partial = Path(file.name)

            def check(_: httpx.Response) -> None:
                file.flush()
                if file_sha256(partial) != sha256:
                    raise ValueError("the downloaded head does not match its checksum")

            try:
                http.send("GET", HEAD_PATH, deadline, check, file=file.file)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return load_head(path), sha256


def _etag(response: httpx.Response) -> str:
    sha256 = response.headers["etag"].removeprefix("W/").strip('"')
    if len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"the head's checksum must have 64 hexadecimal digits, got {sha256!r}")
    return sha256
