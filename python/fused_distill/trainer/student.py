"""The student: its hidden states inside whatever wraps it, and what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..output_heads import OutputHead, decoder_of, output_head
from ..rollout_buffer import split_on_groups
from ..serving.rollouts import Completion, RolloutEngine, Sampling, TransformersRollouts
from ..serving.vllm_rollouts import VllmRollouts
from .config import ConfigError, TrainConfig
from .data import Batch, Sample

T = TypeVar("T")


def pretrained(kind: Any, key: str, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`; a failure names the key."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {name} cannot be loaded: {error}") from error


def load_student(config: TrainConfig) -> Any:
    """The model to be trained, in float32, with adapters if the settings ask for them.

    Dropout is off: rollouts, scores and updates are of the same function.
    """
    model = pretrained(AutoModelForCausalLM, "student", config.student, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in config.frozen):
            parameter.requires_grad_(False)
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


def through_student(wrapped: Any, model: Any, batch: Batch, compute: Callable[[Tensor, OutputHead], T]) -> T:
    """`compute` called with the student's hidden states (B, T - 1, D), each of which predicts the next token,
    and its head; inside the forwards of model and head, where FSDP has gathered their weights."""
    layer = model.get_output_embeddings()

    def whole(tokens: Tensor) -> T:
        output = decoder_of(model)(input_ids=tokens, attention_mask=batch.attention, use_cache=False)
        hidden = output.last_hidden_state[:, :-1]
        return inside_forward(layer, layer, lambda states: compute(states, output_head(model)), hidden)

    return inside_forward(wrapped, model, whole, batch.tokens)


class Writer:
    """Completions of the student as it is, by transformers or by a vLLM server that gets its weights."""

    def __init__(self, wrapped: Any, model: Any, config: TrainConfig, sharded: bool):
        self.wrapped, self.model, self.config, self.sharded = wrapped, model, config, sharded
        self.engine: RolloutEngine = TransformersRollouts(model, synced=sharded)
        self.server: VllmRollouts | None = None
        if config.rollouts.url is not None:
            self.engine = self.server = VllmRollouts(
                config.rollouts.url, token=os.environ.get("FUSED_DISTILL_TOKEN")
            )

    @torch.no_grad()
    def write(self, given: list[Sample], seed: int, n: int, slices: int = 1) -> list[list[Sample]]:
        """n completions of each prompt, cut into slices between prompts."""
        how = self.config.rollouts
        sampling = Sampling(n, how.max_completion_length, how.temperature, how.top_p, how.top_k, seed)

        def generate(*_: Tensor) -> list[Completion]:
            return self.engine.generate([sample.prompt for sample in given], sampling)

        if self.sharded and self.server is None:
            # Adapters generate with a module that FSDP does not begin at.
            completions = inside_forward(self.wrapped, self.model, generate)
        else:
            completions = generate()
        return [
            [Sample(given[c.group].row, c.prompt, c.tokens, c.finish_reason == "length") for c in part]
            for part in split_on_groups(completions, slices)
        ]
