"""The student: the model that is trained, and its hidden states inside DDP or FSDP wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..huggingface.adapters import adapted_tied_weights, check_mergeable, rename_tied_weights
from ..huggingface.forward import run_at_head, run_inside_forward
from ..huggingface.head_check import ordinary_tokens
from ..huggingface.lm_head import LMHeadParams, checked_head, decoder_of, last_hidden_states, output_layer
from ..huggingface.loading import load_causal_lm, load_files, read_tokenizer, require_model
from .config import ConfigError, TrainConfig
from .data import Batch
from .long_sequences import recompute_activations, set_attention

T = TypeVar("T")


def load_pretrained(auto_class: Any, key: str, name: str, **options: Any) -> Any:
    """Load a model with all of its weights, its config or its tokenizer.

    Raises:
        ConfigError: it cannot be loaded; the message names the key.
    """
    try:
        require_model(name)
        if auto_class is AutoModelForCausalLM:
            return load_causal_lm(name, **options)
        if auto_class is AutoTokenizer:
            return read_tokenizer(name)
        return load_files(auto_class.from_pretrained, name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {name} cannot be loaded: {error}") from error


def load_student(config: TrainConfig) -> PreTrainedModel:
    """Load the model to train, in float32; with LoRA and precision bf16 its frozen base is in bfloat16.

    Dropout is disabled, so that rollouts, evaluation and updates use the same function.
    """
    dtype = torch.bfloat16 if config.lora is not None and config.precision == "bf16" else torch.float32
    model = load_pretrained(AutoModelForCausalLM, "student", config.student, dtype=dtype).eval()
    check_lm_head(model, "student")
    _freeze(model, config.frozen)
    if config.lora is not None:
        model = _add_adapters(model, config)
        check_lm_head(model, "student")  # before FSDP shards it
    set_attention(model, config)  # after the checks, because flash attention does not run on a CPU
    if config.gradient_checkpointing:
        recompute_activations(model, "gradient_checkpointing")
    return model


def make_optimizer(
    trained: list[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW. On a GPU it updates the weights in place, where torch's default makes copies of them.

    fp16 keeps torch's default, because accelerate learns of an overflow by the step that is not made.
    """
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda" and config.precision != "fp16",
    )


def check_lm_head(model: PreTrainedModel, key: str, run: Callable[..., Any] | None = None) -> None:
    """Raise a ConfigError that names the key if the losses cannot compute the model's logits.

    `run` is what calls the model if it is sharded; all processes then call this together.
    """
    try:
        checked_head(model, run)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _freeze(model: PreTrainedModel, frozen: list[str]) -> None:
    """Train only parameters that the loss reaches and whose name contains none of `frozen`."""
    modules = (decoder_of(model), output_layer(model))
    used = {id(parameter) for module in modules for parameter in module.parameters()}
    used |= _reached_by(last_hidden_states(model, input_ids=ordinary_tokens(model)))
    parameters = dict(model.named_parameters())
    for part in frozen:
        if not any(part in name for name in parameters):
            raise ConfigError(f"frozen: no parameter has {part!r} in its name, e.g. {[*parameters][:3]}")
    for name, parameter in parameters.items():  # DDP would wait for the gradients of a vision tower
        if id(parameter) not in used or any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"frozen: {frozen} leaves nothing to train")


def _reached_by(states: Tensor) -> set[int]:
    """Return the ids of the parameters that tensors were computed from, e.g. of BERT's transform."""
    reached, seen, pending = set[int](), set[Any](), [states.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            pending.extend(function for function, _ in node.next_functions)
    return reached


def _add_adapters(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    import peft

    assert config.lora is not None
    lora, engine = config.lora, config.rollouts.engine
    adapters = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    try:
        # A PeftModel forwards the attributes of the model that it wraps.
        adapted = cast(PreTrainedModel, peft.get_peft_model(model, adapters).eval())
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error
    if lora.merge or engine != "transformers":
        try:
            check_mergeable(adapted)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules: {error}") from error
    if engine != "transformers" and (tied := adapted_tied_weights(adapted)):
        raise ConfigError(
            f"lora.target_modules: must not hold {tied[0]} with rollouts.engine {engine}: the LM head and "
            "the embedding of the student share a weight, of which vLLM has no second version"
        )
    rename_tied_weights(adapted)
    return adapted


def run_in_student_forward(
    wrapper: nn.Module, model: PreTrainedModel, batch: Batch, compute: Callable[[Tensor, LMHeadParams], T]
) -> T:
    """Call `compute` with the student's hidden states (n, D) of a batch and its LM head.

    The call happens inside the forwards of the model and of the head, where FSDP has gathered their weights.
    """

    def forward(tokens: Tensor) -> T:
        inputs = {"input_ids": tokens, "attention_mask": batch.attention, "use_cache": False}
        return run_at_head(
            model.forward,
            output_layer(model),
            lambda states: compute(batch.pack(states), checked_head(model)[0]),
            **inputs,
        )

    return run_inside_forward(wrapper, model, forward, batch.tokens)
