"""The rollout engine of a run, and how it receives the student's weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from ..rollouts.nccl import NcclWeightSync
from ..rollouts.transformers import TransformersRollouts
from ..rollouts.vllm import VllmInProcessRollouts, VllmRollouts
from .config import TrainConfig

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
        token = os.environ.get("FUSED_DISTILL_ROLLOUT_TOKEN")  # not the teacher's
        if settings.engine == "vllm":
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            length = config.data.max_prompt_length + settings.max_completion_length
            options = {"dtype": VLLM_DTYPES[config.precision], "max_model_len": length}
            if accelerator.num_processes > 1:  # use the launcher's process group
                options["distributed_executor_backend"] = "external_launcher"
            self.engine = VllmInProcessRollouts(
                LLM(model=config.student, **options | settings.engine_options)
            )
        elif settings.engine == "vllm_server":
            url, address, port = str(settings.url), settings.nccl_address, settings.nccl_port
            self.engine = VllmRollouts(url, token=token)
            if address is not None and port is not None:
                rank = accelerator.process_index
                self._nccl = NcclWeightSync(url, model, address=address, port=port, token=token, rank=rank)
        else:
            if accelerator.is_fsdp2:
                register_fsdp_forward_method(wrapped, "generate")
            self.engine = TransformersRollouts(model, synced=accelerator.is_fsdp2, logprobs=False)

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
