"""The student: the model that is trained, and its hidden states inside whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..huggingface.lm_head import LMHeadParams, decoder_of, lm_head_of
from .config import ConfigError, TrainConfig
from .data import Batch

T = TypeVar("T")


def pretrained(kind: Any, key: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`; a failure names the key."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {name} cannot be loaded: {error}") from error


def load_student(config: TrainConfig) -> Any:
    """The model to be trained, in float32; with adapters if the settings ask for them, on weights in bfloat16
    where products are.

    Dropout is off: rollouts, scores and updates are of the same function.
    """
    frozen_base = config.lora is not None and config.precision == "bf16"
    dtype = torch.bfloat16 if frozen_base else torch.float32
    model = pretrained(AutoModelForCausalLM, "student", config.student, dtype=dtype).eval()
    used = {id(p) for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()}
    names = dict(model.named_parameters())
    for part in config.frozen:
        if not any(part in name for name in names):
            raise ConfigError(
                f"frozen: no parameter has {part!r} in its name; they are such as {[*names][:3]}"
            )
    for name, parameter in names.items():  # a vision tower gets no gradient, which DDP would wait for
        if id(parameter) not in used or any(part in name for part in config.frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError(f"frozen: {config.frozen} leaves nothing to train")
    if config.lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs PEFT: pip install peft") from error
    lora = config.lora
    adapters = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    head = model.get_output_embeddings()
    try:
        model = get_peft_model(model, adapters).eval()
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error
    if model.get_output_embeddings() is not head:
        raise ConfigError("lora.target_modules: must not hold the output layer, which the loss fuses")
    return model


def inside_forward(wrapped: Any, module: Any, function: Callable[..., T], *inputs: Tensor) -> T:
    """`function` called in the forward of `wrapped`, `module` with DDP's or FSDP's part around it."""
    own, results = module.forward, []

    def once(*inputs: Tensor) -> T:
        module.forward = own
        results.append(function(*inputs))
        return results[0]

    module.forward = once
    wrapped(*inputs)
    return results[0]  # as computed, not as FSDP casts it


def through_student(
    wrapped: Any, model: Any, batch: Batch, compute: Callable[[Tensor, LMHeadParams], T]
) -> T:
    """`compute` called with the student's hidden states (B, T - 1, D), each of which predicts the next token,
    and its head; inside the forwards of model and head, where FSDP has gathered their weights."""
    layer = model.get_output_embeddings()

    def whole(tokens: Tensor) -> T:
        output = decoder_of(model)(input_ids=tokens, attention_mask=batch.attention, use_cache=False)
        hidden = output.last_hidden_state[:, :-1]
        return inside_forward(layer, layer, lambda states: compute(states, lm_head_of(model)), hidden)

    return inside_forward(wrapped, model, whole, batch.tokens)
