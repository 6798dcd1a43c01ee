"""Teachers behind a server: wire format, server and client. Needs `pip install 'fused-distill[serving]'`."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("numpy", "pydantic", "httpx", "fastapi", "uvicorn", "prometheus_client", "safetensors"):
    if find_spec(_name) is None:
        raise ImportError(f"fused_distill.serving needs {_name}: pip install 'fused-distill[serving]'")
