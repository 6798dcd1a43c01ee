"""The reference trainer. Needs `pip install 'fused-distill[trainer]'`."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("transformers", "accelerate", "datasets", "pydantic", "yaml", "rich", "httpx"):
    if find_spec(_name) is None:
        raise ImportError(f"fused_distill.trainer needs {_name}: pip install 'fused-distill[trainer]'")
