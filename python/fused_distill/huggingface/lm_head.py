"""LM head and decoder of a transformers model: weight, bias, logit scale and softcap for the losses.

Does not import transformers; everything is read from the given model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T")


class LMHeadParams(NamedTuple):
    """LM head with the logits softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Return all but the weight, as keyword arguments of the losses and of `topk_logprobs`."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("bias", "logit_scale", "softcap")}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        logits = self.logit_scale * F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# Config fields that hold a logit scale, of Cohere, Granite, Falcon-H1 and Muse. The default scale is 1.
_SCALE_FIELDS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def lm_head_of(model: Any) -> LMHeadParams:
    """Return the LM head of a `transformers` causal language model.

    Raises:
        ValueError: the model has no output embeddings.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"model must have output embeddings, got {type(model).__name__}")
    config = model.config.get_text_config()
    scale = 1.0
    for field in _SCALE_FIELDS:
        value = getattr(config, field, None)
        if value is not None:
            divides = field == "logits_scaling" and config.model_type != "hyperclovax"
            scale = 1.0 / value if divides else float(value)
    return LMHeadParams(
        layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None)
    )


def decoder_of(model: Any) -> Any:
    """Return the part of a `transformers` causal language model that computes its last hidden states."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder


def run_inside_forward(
    wrapper: Callable[..., Any], module: nn.Module, function: Callable[..., T], *inputs: Tensor
) -> T:
    """Call `function` in place of the forward of `module`, by calling `wrapper`, e.g. its FSDP wrapper."""
    forward, results = module.forward, list[T]()

    def replacement(*inputs: Tensor) -> T:
        module.forward = forward
        results.append(function(*inputs))
        return results[0]

    module.forward = replacement
    try:
        wrapper(*inputs)
    finally:
        module.forward = forward
    return results[0]  # the wrapper's own return value may be cast by FSDP
