"""The output layer of a transformers model as the losses take it: weight, bias, logit scale, softcap; and
what comes before it.

Imports nothing of transformers: everything is read from the model that is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LMHeadParams(NamedTuple):
    """Logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """All but the weight, as keyword arguments of the losses and of `topk_logprobs`."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("bias", "logit_scale", "softcap")}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) from hidden (..., D)."""
        logits = self.logit_scale * F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# config field -> logit scale of a model type. A family that is not here scales nothing.
_SCALES = {
    "logit_scale": lambda value, _: value,  # Cohere
    "logits_scaling": lambda value, model_type: (
        value if model_type == "hyperclovax" else 1.0 / value
    ),  # Granite
    "lm_head_multiplier": lambda value, _: value,  # Falcon-H1
    "output_multiplier": lambda value, _: value,  # Muse
}


def lm_head_of(model: Any) -> LMHeadParams:
    """The output layer of a `transformers` causal language model.

    Raises:
        ValueError: the model has no output embeddings.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"model must have output embeddings, got {type(model).__name__}")
    config = model.config.get_text_config()
    scale = 1.0
    for field, convert in _SCALES.items():
        value = getattr(config, field, None)
        if value is not None:
            scale = float(convert(value, config.model_type))
    return LMHeadParams(
        layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None)
    )


def decoder_of(model: Any) -> Any:
    """The part of a `transformers` causal language model that gives its last hidden states."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder
