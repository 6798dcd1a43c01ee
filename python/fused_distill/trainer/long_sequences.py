"""What long sequences need: recomputed activations, attention, small forward passes and enough positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import ConfigError, TrainConfig
from .data import Sample


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose activations transformers can recompute, innermost first."""
    return [m for m in reversed([*model.modules()]) if isinstance(m, GradientCheckpointingLayer)]


def recompute_activations(model: nn.Module, key: str) -> None:
    """Keep only the inputs of the layers for the backward pass, which runs each layer a second time.

    transformers does so in training mode only, in which dropout would be active.

    Raises:
        ConfigError: the model has no such layers (the message names the key).
    """
    layers = checkpointed_layers(model)
    if not layers:
        raise ConfigError(f"{key}: {type(model).__name__} has no layers that transformers can recompute")
    for layer in layers:  # as FSDP's hooks are outside `forward`, they run once
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def set_attention(model: PreTrainedModel, config: TrainConfig) -> None:
    """Select the model's implementation of attention that the settings name.

    Raises:
        ConfigError: the model, its dtype or the installation does not allow it.
    """
    attention = config.attention
    if attention is None:
        return
    in_float32 = config.precision in ("auto", "fp32") and model.dtype == torch.float32
    if attention == "flash_attention_2" and in_float32:
        raise ConfigError("attention: flash_attention_2 needs precision bf16 or fp16, got fp32")
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"attention: {' '.join(str(error).split())}") from error
    chosen: str = vars(model.config.get_text_config())["_attn_implementation_internal"]
    if chosen != attention:
        raise ConfigError(f"attention: {type(model).__name__} cannot use {attention}")


def split_by_tokens(slices: list[list[Sample]], limit: int, accelerator: Accelerator) -> list[list[Sample]]:
    """Split slices into micro-batches of similar lengths with at most `limit` tokens, padding included.

    A longer sample is alone. All processes call this together with the same number of samples, and get the
    same number of micro-batches, because DDP and FSDP let them compute together.
    """
    parts: list[list[Sample]] = []
    for samples in slices:
        part: list[Sample] = []
        for sample in sorted(samples, key=_length, reverse=True):
            if not part or (len(part) + 1) * _length(part[0]) > limit:
                part = []
                parts.append(part)
            part.append(sample)
    number: Any = accelerator.gather(torch.tensor([len(parts)], device=accelerator.device))
    while len(parts) < int(number.max()):
        i = max((i for i, p in enumerate(parts) if len(p) > 1), key=lambda i: _padded_tokens(parts[i]))
        part = parts[i]
        parts[i : i + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def _padded_tokens(samples: list[Sample]) -> int:
    return len(samples) * max(map(_length, samples))


def _length(sample: Sample) -> int:
    """Return the number of tokens of the longer sequence, the student's or the teacher's."""
    return max(len(sample.tokens), len(sample.for_teacher().tokens))


def check_positions(key: str, model: Any, config: TrainConfig, longest: Callable[[], int]) -> None:
    """Raise a ConfigError that names the key if `longest()` tokens are more than a model has positions for.

    Args:
        key: of the settings.
        model: the model's config.
        config: the settings, which bound the length.
        longest: computes the length of the longest sequence from the data.
    """
    limit = max_positions(model)
    bound = config.data.max_prompt_length + config.rollouts.max_completion_length
    if limit is not None and bound > limit and (length := longest()) > limit:
        raise ConfigError(
            f"{key}: the model has positions for {limit} tokens, the longest prompt with "
            f"rollouts.max_completion_length ({config.rollouts.max_completion_length}) needs {length}; lower "
            f"that or data.max_prompt_length ({config.data.max_prompt_length})"
        )


def max_positions(model: Any) -> int | None:
    """Return the number of tokens that a model of the given config takes, or None if it sets no limit."""
    config = model.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if original and factor:  # some configs keep the limit of the model before its extension
            limit = max(limit, int(original * factor))
    return limit
