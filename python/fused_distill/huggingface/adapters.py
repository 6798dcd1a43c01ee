"""LoRA adapters (PEFT) merged into the weights of a model that is not changed by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..parallel.dtensor import gather_dtensor

_PREFIX = "base_model.model."  # of a PeftModel's parameters


def base_weights(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a PEFT model's tensors but those of adapters, under their names in the model without adapters."""
    adapters = _adapter_names(model)
    return ((_base_name(name), tensor) for name, tensor in tensors.items() if name not in adapters)


def merged_weights(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what `base_weights` yields, with the LoRA adapters that the model applies added in float32.

    Args:
        model: a PeftModel with LoRA adapters.
        tensors: its parameters or its state dict. DTensors (FSDP2) are gathered one by one, for which all
            processes iterate together.

    Raises:
        ValueError: see `check_mergeable`. Nothing was yielded.
    """
    check_mergeable(model)
    return _merged(model, tensors)


def check_mergeable(model: Any) -> None:
    """Check that a PEFT model has plain LoRA adapters only, which can be merged.

    Raises:
        ValueError: it has others (the message names the layer).
    """
    needed = "model must have plain LoRA adapters of linear layers and embeddings to merge them, got"
    for adapter, config in model.peft_config.items():
        if config.peft_type != "LORA":
            raise ValueError(f"{needed} the adapter {adapter!r} of type {config.peft_type.value}")
    for name, module in model.named_modules():
        if other := _other_than_lora(module):
            raise ValueError(f"{needed} {other} at {_base_name(name)}")


@torch.no_grad()
def _merged(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    adapters, layers = _adapter_names(model), dict(_lora_layers(model))
    for name, tensor in tensors.items():
        if name in adapters:
            continue
        merged, layer_name = gather_dtensor(tensor).detach(), name.removesuffix(".base_layer.weight")
        if layer_name != name and layer_name in layers:
            layer = layers[layer_name]
            deltas = [_delta(layer, layer_name, adapter, tensors) for adapter in _applied_adapters(layer)]
            merged = sum(deltas, merged.float()).to(merged.dtype)
        yield _base_name(name), merged


def adapted_tied_weights(model: Any) -> list[str]:
    """Return the layers with adapters whose weight other layers share, e.g. a tied LM head."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [_base_name(n) for n, layer in _lora_layers(model) if uses[id(layer.get_base_layer().weight)] > 1]


def rename_tied_weights(model: nn.Module) -> None:
    """Let transformers find tied weights that adapters have moved: accelerate ties again when it shards."""
    for module in model.modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            pairs = cast(dict[str, str], keys).items()
            moved: Any = {_moved_name(a, names): _moved_name(b, names) for a, b in pairs}
            module._tied_weights_keys = moved


def _moved_name(name: str, names: set[str]) -> str:
    moved = f"{name.removesuffix('.weight')}.base_layer.weight"
    return moved if moved in names else name


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _applied_adapters(layer: Any) -> list[str]:
    """Return the adapters that a layer adds to its weight in every forward pass."""
    if layer.merged or layer.disable_adapters:
        return []
    return [adapter for adapter in layer.active_adapters if adapter in layer.scaling]


def _other_than_lora(module: nn.Module) -> str | None:
    """Return what a module has that `merged_weights` cannot merge, in the words of PEFT's LoraConfig."""
    from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return "modules_to_save" if isinstance(module, ModulesToSaveWrapper) else "trainable_token_indices"
    if isinstance(module, ParamWrapper):
        return "adapters of single parameters, such as experts (target_parameters),"
    if not isinstance(module, LoraLayer):
        return None
    if not isinstance(module, Linear | Embedding):
        return f"a layer of type {type(module).__name__}"
    if module.merged and module.disable_adapters:
        return "adapters that are merged and disabled"
    for adapter in _applied_adapters(module):
        if adapter in module.lora_variant:
            dora = module.use_dora.get(adapter)
            return "use_dora" if dora else f"a variant of type {type(module.lora_variant[adapter]).__name__}"
        if module.lora_bias.get(adapter):
            return "lora_bias"
    return None


def _adapter_names(model: Any) -> set[str]:
    """Return the names of the parameters of adapters."""
    names: set[str] = set()
    for layer_name, layer in _lora_layers(model):
        assert isinstance(layer, nn.Module)
        own = (name for name, _ in layer.named_parameters() if not name.startswith("base_layer."))
        names.update(f"{layer_name}.{name}" for name in own)
    return names


def _delta(layer: Any, name: str, adapter: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what an adapter adds to the weight of its layer."""
    of_embedding = adapter in layer.lora_embedding_A
    pattern = (
        f"{name}.lora_embedding_{{}}.{adapter}" if of_embedding else f"{name}.lora_{{}}.{adapter}.weight"
    )
    a, b = (gather_dtensor(tensors[pattern.format(side)]).float() for side in "AB")
    delta = layer.scaling[adapter] * (b @ a)
    return delta.T if of_embedding or getattr(layer, "fan_in_fan_out", False) else delta


def _base_name(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")
