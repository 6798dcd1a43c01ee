"""Teachers behind a server: the protocol, the client (extra `client`) and the server (extra `server`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

_CLIENT_PACKAGES = ("httpx", "numpy", "safetensors", "tenacity")
_SERVER_PACKAGES = (*_CLIENT_PACKAGES, "pydantic", "fastapi", "uvicorn", "prometheus_client", "msgspec")


def require_packages(extra: Literal["client", "server"]) -> None:
    """Raise an ImportError that names the extra if one of its packages is missing."""
    for package in _CLIENT_PACKAGES if extra == "client" else _SERVER_PACKAGES:
        if find_spec(package) is None:
            raise ImportError(
                f"fused_distill.serving.{extra} needs {package}: pip install 'fused-distill[{extra}]'"
            )
