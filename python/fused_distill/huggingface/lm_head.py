"""LM head and hidden states of a transformers model: weight, bias, logit scale and softcap for the losses.

Does not import transformers; everything is read from the given model, or found by running it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .forward import states_at_head
from .head_check import HeadCheck, check_head, config_numbers
from .head_weight import head_weight

_log = logging.getLogger(__name__)
# The output layer and the config of each model that was checked, and what the check found.
_checks: WeakKeyDictionary[Any, tuple[ref[nn.Module], list[float], HeadCheck]] = WeakKeyDictionary()
# Config fields that hold a logit scale, of Cohere, Granite, Falcon-H1 and Muse. The default scale is 1.
_SCALE_FIELDS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
# Config fields that hold a softcap, of Gemma, RecurrentGemma and xLSTM.
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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


def lm_head_of(model: Any) -> LMHeadParams:
    """Return the LM head of a `transformers` causal language model.

    The first call runs the model on six tokens, in eval mode and without gradients, and compares what it
    computes after the hidden states with the head. The result is kept until the output layer or the config
    changes. Weights that are sharded cannot be run by one process alone: call this before sharding the model.
    Otherwise scale and softcap are read from the config, unchecked, with a warning.

    LoRA adapters on the output layer are part of the weight, which is then a new tensor in every call.

    The head belongs to the hidden states that `last_hidden_states` returns. Some models, e.g. RoBERTa,
    transform those of `model.get_decoder()` before the head; then there is a warning.

    Args:
        model: it may be wrapped by PEFT, DDP, FSDP2 or torch.compile.

    Raises:
        ValueError: the model has no output embeddings, or its logits do not follow from them by a bias, a
            scale and a softcap.
    """
    head, check = checked_head(model)
    if check is not None and not check.decoder_matches:
        warnings.warn(
            f"{type(model).__name__} transforms the last hidden states of its decoder before its LM head: "
            "take them from fused_distill.huggingface.lm_head.last_hidden_states(model, ...), not from "
            "model.get_decoder()",
            stacklevel=2,
        )
    return head


def last_hidden_states(model: Any, **inputs: Any) -> Tensor:
    """Return the (B, L, D) hidden states that a model gives to its LM head, computing no logits.

    Args:
        model: a `transformers` causal language model, which may be wrapped by PEFT, DDP or FSDP2.
        inputs: of its forward, e.g. input_ids and attention_mask. `labels` are left out: no loss is computed.

    Raises:
        ValueError: the model has no output embeddings.
    """
    inputs.pop("labels", None)
    return states_at_head(model, output_layer(_causal_lm(model)), **inputs)


def checked_head(model: Any, run: Callable[..., Any] | None = None) -> tuple[LMHeadParams, HeadCheck | None]:
    """Return the LM head and what the check of `lm_head_of` found, None if sharded weights prevent it.

    Args:
        model: a causal language model.
        run: calls the model if it is sharded, e.g. its FSDP wrapper. All processes must then call this
            function at the same time. None: a sharded model is not checked.
    """
    model = _causal_lm(model)
    if hasattr(model, "get_base_model"):  # of PEFT, with the adapters in its layers
        model = model.get_base_model()
    layer, sharded = output_layer(model), _is_sharded(model)
    weight, bias = head_weight(layer, type(model).__name__)
    numbers, check = config_numbers(model), None
    if model in _checks:
        of_layer, of_numbers, known = _checks[model]
        if sharded or (of_layer() is layer and of_numbers == numbers):  # FSDP may wrap the layer
            check = known
    if check is None and (run is not None or not sharded):
        forward = run if run is not None and sharded else model.forward
        check = check_head(model, layer, decoder_of(model), forward)
        _checks[model] = ref(layer), numbers, check
    if check is None:
        _log.warning(
            "the weights of %s are sharded or not loaded, so that its LM head is not compared with its "
            "logits: scale and softcap are read from its config. Call lm_head_of(model) before sharding it",
            type(model).__name__,
        )
        return LMHeadParams(weight, bias, *_config_scale_and_softcap(model)), None
    if check.n_logits < len(weight):
        weight, bias = weight[: check.n_logits], None if bias is None else bias[: check.n_logits]
    return LMHeadParams(weight, bias, check.logit_scale, check.softcap), check


def _causal_lm(model: Any) -> Any:
    """Return what DDP and torch.compile wrap."""
    while not hasattr(model, "get_output_embeddings"):
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model must not be in nn.DataParallel, whose copies of it each see a part of the batch: use "
                "DistributedDataParallel (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise ValueError(
                f"model must be a transformers causal language model, got {type(model).__name__}"
            )
        model = inner
    return getattr(model, "_orig_mod", model)  # forwards attributes


def _is_sharded(model: nn.Module) -> bool:
    """Return True if one process cannot run the model alone: FSDP, DeepSpeed ZeRO-3, tensor parallelism."""
    if any(p.is_meta or hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()):
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def _config_scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """Return the logit scale and the softcap that the config names."""
    config, scale = model.config.get_text_config(), 1.0
    for field in _SCALE_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, (int, float)):
            divides = field == "logits_scaling" and config.model_type != "hyperclovax"
            scale = 1.0 / value if divides else float(value)
    softcaps = [getattr(config, field, None) for field in _SOFTCAP_FIELDS]
    return scale, next((softcap for softcap in softcaps if softcap is not None), None)


def output_layer(model: Any) -> nn.Module:
    """Return the output layer of a causal language model, which must have one."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"model must have output embeddings, got {type(model).__name__}: "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    return layer


def decoder_of(model: Any) -> Any:
    """Return the part of a `transformers` causal language model that computes its last hidden states."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder
