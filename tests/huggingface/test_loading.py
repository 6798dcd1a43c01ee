"""Models of folders that are incomplete, of another kind, or not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.huggingface.loading import load_causal_lm, load_files, require_model

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def saved(kind: str, folder: Path, **options: Any) -> str:
    """Save a random Llama of a kind, e.g. LlamaModel, and return its folder."""
    getattr(transformers, kind)(transformers.LlamaConfig(**SIZES, **options)).save_pretrained(folder)
    return str(folder)


def changed_config(folder: str, **changes: Any) -> str:
    """Change the config of a saved model, so that its weights no longer fit."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


INCOMPLETE: dict[str, tuple[Callable[[Path], str], str]] = {
    "base model": (lambda path: saved("LlamaModel", path), r"lacks the weights lm_head\.weight;"),
    "classifier": (lambda path: saved("LlamaForSequenceClassification", path), r"lacks .* lm_head\.weight;"),
    "fewer layers": (
        lambda path: changed_config(saved("LlamaForCausalLM", path), num_hidden_layers=3),
        r"lacks the weights model\.layers\.2\.input_layernorm\.weight, .* and 4 more;",
    ),
    "other shapes": (
        lambda path: changed_config(saved("LlamaForCausalLM", path), vocab_size=60),
        r"has weights of other shapes: lm_head\.weight \(is \[50, 16\], should be \[60, 16\]\), model\.embed",
    ),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_weights_that_are_not_in_the_checkpoint_are_an_error(kind: str, tmp_path: Path) -> None:
    make, message = INCOMPLETE[kind]
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} {message}"):
        load_causal_lm(make(tmp_path))


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaModel"])
def test_a_tied_lm_head_is_not_missing(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(saved(kind, tmp_path, tie_word_embeddings=True), dtype=torch.bfloat16)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("length", [0, 4, 100, -100])
def test_a_weight_file_that_is_cut_off_is_named(tmp_path: Path, length: int) -> None:
    weights = Path(saved("LlamaForCausalLM", tmp_path)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(OSError, match=rf"{re.escape(str(weights))} is not a whole safetensors file"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model', r"config\.json is no JSON, it may be truncated"),
        ("model.safetensors.index.json", '{"weight', "index of the weights is no JSON"),
        ("model.safetensors.index.json", "{}", "has an index without weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is not a"),
        ("pytorch_model.bin", "PK", r"pytorch_model\.bin is no file of torch\.save, it may be truncated"),
        ("pytorch_model.bin", "", r"pytorch_model\.bin is no file of torch\.save, it may be truncated"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    saved("LlamaForCausalLM", tmp_path)
    if "config" not in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(OSError, match=message):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", r"tokenizer\.json is no JSON"), ("{}", r"the files of .* cannot be read: KeyError")],
)
def test_a_damaged_tokenizer_is_named(tiny_model: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(OSError, match=message):
        load_files(transformers.AutoTokenizer.from_pretrained, str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "~/missing", "a/b/c"])
def test_a_missing_folder_is_called_missing(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"the folder {re.escape(name)} does not exist"):
        require_model(name)


def test_a_folder_or_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        require_model(str(tmp_path))
    (tmp_path / "weights").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        require_model(str(tmp_path / "weights"))


def test_a_hub_name_is_not_taken_for_a_folder() -> None:
    require_model("gpt2")
    require_model("google/gemma-3-270m")
