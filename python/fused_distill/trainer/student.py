"""The student: its hidden states inside whatever wraps it, and what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..serving.rollouts import RolloutEngine, Sampling, TransformersRollouts
from ..serving.vllm_rollouts import VllmRollouts
from .config import TrainConfig
from .data import Batch, Prompt, Sample

T = TypeVar("T")


def load_student(config: TrainConfig) -> Any:
    """The model to be trained, in float32, with adapters if the settings ask for them.

    Dropout is off: rollouts, scores and updates are of the same function.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(config.student, dtype=torch.float32).eval()
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
    return get_peft_model(model, adapters).eval()


def inside_forward(wrapped: Any, model: Any, function: Callable[[], T]) -> T:
    """`function` called in the forward of `wrapped`, the model in DDP or FSDP, which then do their part."""
    own = model.forward

    def once(*_: object, **__: object) -> T:
        model.forward = own
        return function()

    model.forward = once
    return wrapped()


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """(B, T - 1, D) last hidden states; the one at a token predicts the next."""
    decoder = model.get_decoder()
    output = decoder(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
    return output.last_hidden_state[:, :-1]


class Written(NamedTuple):
    """A sample for `split_on_groups`."""

    group: int  # the prompt's position in the call
    tokens: list[int]
    sample: Sample


class Writer:
    """Completions of the student as it is, by transformers or by a vLLM server that gets its weights."""

    def __init__(self, model: Any, config: TrainConfig):
        self.config = config
        self.engine: RolloutEngine = TransformersRollouts(model)
        self.server: VllmRollouts | None = None
        if config.rollouts.url is not None:
            self.engine = self.server = VllmRollouts(
                config.rollouts.url, token=os.environ.get("FUSED_DISTILL_TOKEN")
            )

    def sync(self, save: Callable[[Path], None]) -> None:
        """Send the weights that `save` writes, if there is a server to send them to."""
        if self.server is not None:
            folder = self.config.output / "weights"
            save(folder)
            self.server.sync_from_disk(folder)

    def write(self, prompts: list[Prompt], seed: int, n: int | None = None) -> list[Written]:
        """n completions of each prompt."""
        how = self.config.rollouts
        sampling = Sampling(
            n=n or how.num_generations,
            max_tokens=how.max_completion_length,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            seed=seed,
        )
        completions = self.engine.generate([p.tokens for p in prompts], sampling)
        found: list[Written] = []
        for c in completions:
            sample = Sample(prompts[c.group].row, c.prompt, c.tokens, c.finish_reason == "length")
            found.append(Written(c.group, c.tokens, sample))
        return found
