"""The student as it is saved: whole, merged from LoRA adapters, or the adapters alone, in a dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..huggingface.adapters import adapted_tied_weights, merged_weights
from .config import TrainConfig
from .student import load_pretrained


def saved_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of `student/`: that of the settings, or of the model that the run starts from."""
    if config.save_dtype != "auto":
        return getattr(torch, config.save_dtype)
    model = load_pretrained(AutoConfig, "student", config.student)
    dtype = model.dtype or model.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def save_student(
    accelerator: Accelerator,
    wrapped: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Save the student in the format of transformers, or of PEFT; all processes call it together.

    Args:
        accelerator: which prepared the student.
        wrapped: the student, prepared.
        tokenizer: saved beside it.
        folder: replaced file by file.
        merge: save LoRA adapters merged into the weights, not alone.
        dtype: of the saved weights; None: that of training. Adapters alone always have that of training.
    """
    state: dict[str, Any] = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        model: Any = accelerator.unwrap_model(wrapped)
        adapted = hasattr(model, "get_base_model")
        untied = adapted and merge and bool(adapted_tied_weights(model))
        if not untied:  # transformers does not recognise copies of tied weights when gathered from shards
            names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in model.named_parameters()}
            state = {name: tensor for name, tensor in state.items() if name not in tied}
        if adapted and not merge:  # PEFT would also save an output layer that has adapters
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        else:
            if adapted:
                state, model = dict(merged_weights(model, state)), model.get_base_model()
            state = {name: _cast(tensor, dtype) for name, tensor in state.items()}
            model.save_pretrained(folder, state_dict=state)
            config = copy.deepcopy(model.config)
            config.dtype = dtype or config.dtype
            if untied:
                config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
            config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
