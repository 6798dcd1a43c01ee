"""A random model and a stock vLLM server of it, for the tests against a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import running
from vllm_cases import SETTINGS, VOCAB, load, vllm_command

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, of a head size that vLLM has kernels for, with the tiny model's tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # distributions that are not nearly uniform
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stock vLLM server."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with running(vllm_command(folder, "--max-logprobs", "64"), log, **SETTINGS) as server:
        yield server.url


@pytest.fixture(scope="session")
def changed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other weights."""
    path = tmp_path_factory.mktemp("changed")
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(7, 0))
    model.save_pretrained(path)
    return path
