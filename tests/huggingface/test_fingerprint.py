"""Fingerprints of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fused_distill.huggingface.fingerprint import (
    checkpoint_fingerprint,
    local_checkpoint,
    model_fingerprint,
    tensor_shapes,
    weight_files,
)
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(300, 200, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    return layer


def test_a_bfloat16_checkpoint_keeps_its_fingerprint_in_float32() -> None:
    assert model_fingerprint(linear()) == model_fingerprint(linear(torch.float32))


def test_a_sharded_model_has_the_fingerprint_of_the_whole_one(tmp_path: Path) -> None:
    layer, whole = linear(), model_fingerprint(linear())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(layer.weight, DTensor)
        assert model_fingerprint(layer) == whole
    finally:
        distributed.destroy_process_group()


def test_a_small_step_of_the_optimizer_changes_it() -> None:
    layer = linear(torch.float32)
    before = model_fingerprint(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1e-4)
    assert model_fingerprint(layer) != before


def test_other_names_and_shapes_change_it() -> None:
    layer = linear()
    renamed = nn.ParameterDict({"w": layer.weight, "bias": layer.bias})
    reshaped = nn.ParameterDict({"weight": layer.weight.reshape(200, 2, 150), "bias": layer.bias})
    assert len({model_fingerprint(m) for m in (layer, renamed, reshaped)}) == 3


@pytest.mark.parametrize(
    "parameter",
    [
        torch.ones(20, 30).to(torch.float8_e4m3fn),
        torch.ones(20, 30, dtype=torch.uint8),
        torch.ones(20, 30, dtype=torch.int32),
        torch.ones(2, 3, 4),
        torch.ones(()),
        torch.ones(0),
        torch.ones(3, 0),
    ],
    ids=lambda parameter: f"{parameter.dtype} {[*parameter.shape]}",
)
def test_parameters_of_any_dtype_and_shape_have_one(parameter: torch.Tensor) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(parameter, requires_grad=False)})
    assert re.fullmatch("[0-9a-f]{32}", model_fingerprint(model))


def test_a_saved_model_has_the_fingerprint_of_its_file(tiny_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert checkpoint_fingerprint(tmp_path) == model_fingerprint(model)
    assert tensor_shapes(tmp_path) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_weights_that_are_saved_a_second_time_do_not_count(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / "model.safetensors").read_bytes())
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert checkpoint_fingerprint(tmp_path) == checkpoint_fingerprint(tiny_model)


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    assert checkpoint_fingerprint(tmp_path) is None
    assert tensor_shapes(tmp_path) == {}


def test_a_truncated_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    content = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        tensor_shapes(tmp_path)


def test_names_that_are_neither_folders_nor_cached_have_no_local_checkpoint(tmp_path: Path) -> None:
    assert local_checkpoint(str(tmp_path)) == tmp_path
    assert local_checkpoint("nobody/has-this") is None
    assert local_checkpoint("not a name!") is None
