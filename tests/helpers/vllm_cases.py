"""Settings and commands of a real vLLM, which the tests of tests/real_vllm share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

PYTHON = os.environ.get("FUSED_DISTILL_VLLM_PYTHON")
VOCAB = 98
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}


def vllm_command(folder: Path, *options: str) -> list[str]:
    """Return the command of a stock vLLM server, but for its port."""
    return [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--host", "127.0.0.1"),
        *options,
    ]


def load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
