"""The rollout engine of a run, and how it receives the student's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from ..rollouts.base import Completion, Sampling
from ..rollouts.nccl import NcclWeightSync
from ..rollouts.transformers import TransformersRollouts
from ..rollouts.vllm import VllmInProcessRollouts, VllmRollouts
from .config import ConfigError, RolloutConfig, TrainConfig

VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class StudentRollouts:
    """Completions of the student by the engine of the settings."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        wrapped: PreTrainedModel,  # by accelerator.prepare
        save: Callable[[Path], None],  # the student to a folder, called by all processes together
    ):
        self._accelerator, self._folder, self._save = accelerator, config.output / "weights", save
        self._nccl: NcclWeightSync | None = None
        self.weights_synced_step: int | None = None  # None: vLLM has no weights of this run
        settings, model = config.rollouts, accelerator.unwrap_model(wrapped)
        token = os.environ.get("FUSED_DISTILL_TOKEN")
        if settings.engine == "vllm":
            self.engine = load_vllm(config, accelerator.num_processes)
        elif settings.engine == "vllm_server":
            assert settings.url is not None
            self.engine = VllmRollouts(settings.url, token=token)
            if settings.sync == "nccl":
                assert settings.nccl_address is not None
                assert settings.nccl_port is not None
                self._nccl = NcclWeightSync(
                    settings.url,
                    model,
                    address=settings.nccl_address,
                    port=settings.nccl_port,
                    token=token,
                    rank=accelerator.process_index,
                )
        else:
            if accelerator.is_fsdp2:
                register_fsdp_forward_method(wrapped, "generate")
            self.engine = TransformersRollouts(model, synced=accelerator.is_fsdp2, logprobs=False)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return n completions of each prompt; the group of a completion is the index of its prompt."""
        return self.engine.generate(prompts, sampling)

    def sync_weights(self, step: int) -> None:
        """Send the student's weights to vLLM, unless it has those of this step."""
        if isinstance(self.engine, TransformersRollouts) or self.weights_synced_step == step:
            return
        if self._nccl is not None:
            self._nccl.sync()
        else:
            self._save(self._folder)
            if self._accelerator.is_main_process or isinstance(self.engine, VllmInProcessRollouts):
                self.engine.sync_from_disk(self._folder)
        self._accelerator.wait_for_everyone()
        self.weights_synced_step = step

    def close(self) -> None:
        """Leave the NCCL group, if there is one."""
        if self._nccl is not None:
            self._nccl.close()


def check_vllm_installed(settings: RolloutConfig) -> None:
    """Raise a ConfigError if the settings need vLLM in this process and it is not installed."""
    for key, value, needs_vllm in (("engine", settings.engine, "vllm"), ("sync", settings.sync, "nccl")):
        if value == needs_vllm and find_spec("vllm") is None:
            raise ConfigError(f"rollouts.{key}: {value} needs vLLM beside the trainer: pip install vllm")


def load_vllm(config: TrainConfig, processes: int) -> VllmInProcessRollouts:
    """Start a vLLM engine of this process alone, with the student as it is before training."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    options = {
        "dtype": VLLM_DTYPES[config.precision],
        "max_model_len": config.data.max_prompt_length + config.rollouts.max_completion_length,
    }
    if processes > 1:  # vLLM then uses the process group of the launcher instead of starting its own
        options["distributed_executor_backend"] = "external_launcher"
    return VllmInProcessRollouts(LLM(model=config.student, **options | config.rollouts.engine_options))
