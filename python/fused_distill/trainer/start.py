"""What happens before a run loads anything: its devices, and checks of its packages, shares and output."""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from ..huggingface.loading import find_broken_weights
from .config import ConfigError, TrainConfig


def check_output(folder: Path) -> None:
    """Make the output folder, and raise a ConfigError unless a file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written: {error.strerror or error}") from error


def check_weight_files(config: TrainConfig) -> None:
    """Raise a ConfigError if weight files of student or teacher are truncated, before anything is loaded."""
    models: list[tuple[str, str | None]] = [("student", config.student)]
    for name, teacher in config.all_teachers.items():
        if not teacher.is_self:
            models.append((f"teachers.{name}.model" if name else "teacher.model", teacher.model))
    for key, name in models:
        problem = None if name is None else find_broken_weights(name)
        if problem is not None:
            raise ConfigError(f"{key}: {problem}")


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """Return accelerate's Accelerator for a run, and the settings with a precision for its device."""
    state = form_group(config)
    device: Any = state.device
    config = choose_precision(config, device)
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=device.type == "cpu",
        log_with=[*config.trackers] or None,
        project_dir=str(config.output),
    )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version: must be 2 (of accelerate's settings)")
    return accelerator, config


def form_group(config: TrainConfig) -> PartialState:
    """Connect the processes of a run, with time to wait for one that tokenizes or retries its server."""
    cpu = not torch.accelerator.is_available()  # else processes on a CPU would not form a group
    deadline = max(teacher.deadline_seconds for teacher in config.all_teachers.values())
    return PartialState(cpu, timeout=timedelta(hours=2, seconds=deadline))


def choose_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the settings with precision auto replaced by bf16 or fp32.

    Raises:
        ConfigError: precision is fp16 on a CPU, where accelerate would compute in fp32 without a word.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU, but this run is on a CPU: use fp32, bf16 or auto")
    if config.precision != "auto":
        return config
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.model_copy(update={"precision": "bf16" if bf16 else "fp32"})


def check_packages(config: TrainConfig) -> None:
    """Raise a ConfigError if a package that the settings need is not installed."""
    rollouts = config.rollouts
    for needed, setting, package in (
        (config.lora is not None, "lora", "peft"),
        (rollouts.engine == "vllm", "rollouts.engine: vllm", "vllm"),
        (rollouts.sync == "nccl", "rollouts.sync: nccl", "vllm"),
        (config.attention == "flash_attention_2", "attention: flash_attention_2", "flash_attn"),
        *((True, f"trackers: {name}", name) for name in config.trackers),
    ):
        if needed and find_spec(package) is None:
            raise ConfigError(f"{setting} needs {package} beside the trainer: pip install {package}")


def check_shares(config: TrainConfig, processes: int) -> None:
    """Raise a ConfigError unless processes and slices get equal shares of the prompts."""
    slices, prompts = processes * config.gradient_accumulation_steps, config.data.evaluation_prompts
    if config.prompts_per_step % slices:
        shares = f"{slices} (gradient_accumulation_steps times processes)"
        raise ConfigError(f"prompts_per_step: {config.prompts_per_step} must be a multiple of {shares}")
    if prompts % processes:
        raise ConfigError(f"data.evaluation_prompts: {prompts} must be a multiple of {processes} processes")
