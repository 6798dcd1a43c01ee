"""Weight and bias of an output layer, with the LoRA adapters on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def head_weight(layer: Any, model_name: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight (V, D) and the bias (V,) with which an output layer multiplies.

    Active LoRA adapters are added to the weight, in a new tensor through which they get their gradient.

    Raises:
        ValueError: the layer is no linear layer, or has adapters that are no sum of a weight and LoRA.
    """
    base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = getattr(weight, "dtype", "no weight")
        raise ValueError(
            f"the output layer of {model_name} must be one linear layer with a floating-point weight, "
            f"got {type(base).__name__} with {kind}"
        )
    lora_a, lora_b = getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
    used = {id(weight), id(bias), *(id(m.weight) for m in (*lora_a.values(), *lora_b.values()))}
    if base is not layer and not layer.merged and not layer.disable_adapters:
        for adapter in (a for a in layer.active_adapters if a in lora_a):
            dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
            if layer.training and dropout > 0:
                raise ValueError(
                    f"the LoRA adapter {adapter!r} on the output layer of {model_name} has dropout "
                    f"{dropout}, which no weight expresses: set lora_dropout to 0"
                )
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in used:
            raise ValueError(
                f"the output layer of {model_name} trains {name}, which is neither its weight, its bias nor "
                "a LoRA matrix: such adapters on the output layer are not supported"
            )
    return weight, bias
