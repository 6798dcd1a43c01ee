"""The rollout engine of a run, and how it receives the student's weights."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..rollouts.base import Completion, Sampling
from ..rollouts.nccl import NcclWeightSync
from ..rollouts.transformers import TransformersRollouts, end_tokens
from ..rollouts.vllm import MOST_FORBIDDEN, VllmInProcessRollouts, VllmRollouts
from ..rollouts.weights import WeightsError, model_logprobs
from .ahead import RolloutsAhead
from .config import ConfigError, TrainConfig
from .conversations import RowError, tokenize_row
from .saving import save_student

_log = logging.getLogger(__name__)

VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class StudentRollouts:
    """Completions of the student by the engine of the settings."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        wrapped: PreTrainedModel,  # by accelerator.prepare
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,  # tokens that student and teacher have in common
    ):
        self._accelerator, self._wrapped, self._tokenizer = accelerator, wrapped, tokenizer
        self._folder = config.output / "weights"
        self._nccl: NcclWeightSync | None = None
        self.weights_synced_step: int | None = None  # None: vLLM has no weights of this run
        settings, model = config.rollouts, accelerator.unwrap_model(wrapped)
        self._settings = settings
        self.ahead = RolloutsAhead(accelerator)
        if settings.ahead:
            accelerator.register_for_checkpointing(self.ahead)
        self._stop_token_ids = () if end_tokens(model) else fallback_ends(tokenizer, config)
        rows = model.config.get_text_config().vocab_size
        self._vocab_size = vocab_size if vocab_size < rows else None
        if settings.engine != "transformers" and rows - vocab_size > MOST_FORBIDDEN:
            raise ConfigError(
                f"rollouts.engine: {settings.engine} cannot exclude the {rows - vocab_size} tokens of the "
                f"student that the teacher lacks, {MOST_FORBIDDEN} at most; use transformers"
            )
        token = os.environ.get("FUSED_DISTILL_ROLLOUT_TOKEN")  # not the teacher's
        if settings.engine == "vllm":
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            length = config.data.max_prompt_length + settings.max_completion_length
            options = {"dtype": VLLM_DTYPES[config.precision], "max_model_len": length}
            if accelerator.num_processes > 1:  # use the launcher's process group
                options["distributed_executor_backend"] = "external_launcher"
            self.engine = VllmInProcessRollouts(
                LLM(model=config.student, **options | settings.engine_options), vocab_size=rows
            )
        elif settings.engine == "vllm_server":
            url, address, port = str(settings.url), settings.nccl_address, settings.nccl_port
            self.engine = VllmRollouts(url, token=token, vocab_size=rows)
            if address is not None and port is not None:
                rank = accelerator.process_index
                self._nccl = NcclWeightSync(url, model, address=address, port=port, token=token, rank=rank)
        else:
            if accelerator.is_fsdp2:
                register_fsdp_forward_method(wrapped, "generate")
            self.engine = TransformersRollouts(model, settings.batch_size, synced=accelerator.is_fsdp2)

    def sampling(self, n: int, seed: int) -> Sampling:
        """Return the settings' options for n completions per prompt."""
        settings = self._settings
        return Sampling(
            n,
            settings.max_completion_length,
            settings.temperature,
            settings.top_p,
            settings.top_k,
            seed,
            self._stop_token_ids,
            self._vocab_size,
        )

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """Return completions by the weights of the last `sync_weights`; all processes call it together.

        If a vLLM server was restarted, it gets the student's weights again, and all processes generate again.

        Raises:
            WeightsError: the server has other weights again, or gets them over NCCL, whose group has ended.
        """
        if not isinstance(self.engine, VllmRollouts):
            return self.engine.generate(prompts, sampling)
        problem: WeightsError | None = None
        completions: list[Completion] = []
        started = self.ahead.take(sampling.seed, prompts)
        try:
            completions = started() if started else self.engine.generate(prompts, sampling)
        except WeightsError as error:
            problem = error
        failures = torch.tensor(int(problem is not None), device=self._accelerator.device)
        if not self._accelerator.reduce(failures, "sum"):  # pyright: ignore[reportArgumentType]
            return completions
        if self._nccl is not None:
            raise problem or WeightsError("another process found other weights than vLLM was sent")
        _log.warning("vLLM gets the student's weights again: %s", problem or "another process found others")
        self._send_weights()
        return self.engine.generate(prompts, sampling)

    def generate_ahead(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Start to generate by the weights of the last `sync_weights`; `generate` takes the completions."""
        self.ahead.start(sampling.seed, prompts, partial(self.engine.generate, prompts, sampling))

    def sync_weights(self, step: int) -> None:
        """Send the student's weights to vLLM, unless it has those of this step.

        Raises:
            WeightsError: vLLM's log-probabilities of a few tokens are not the student's.
        """
        if isinstance(self.engine, TransformersRollouts) or self.weights_synced_step == step:
            return
        self._send_weights()
        self.weights_synced_step = step

    def _send_weights(self) -> None:
        assert not isinstance(self.engine, TransformersRollouts)
        self.ahead.wait()
        vocab_size = self._accelerator.unwrap_model(self._wrapped).config.get_text_config().vocab_size
        expected = model_logprobs(self._wrapped, vocab_size, self._accelerator.device)
        sends = self._accelerator.is_main_process or isinstance(self.engine, VllmInProcessRollouts)
        if self._nccl is not None:
            self._nccl.sync()
        else:
            save_student(self._accelerator, self._wrapped, self._tokenizer, self._folder, merge=True)
            if sends:
                self.engine.sync_from_disk(self._folder, expected)
        self._accelerator.wait_for_everyone()
        if isinstance(self.engine, VllmRollouts) and (self._nccl is not None or not sends):
            self.engine.verify_weights(expected)

    def close(self) -> None:
        """Leave the NCCL group, if there is one."""
        if self._nccl is not None:
            self._nccl.close()


def fallback_ends(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> tuple[int, ...]:
    """Return the tokens that end a text of a model that names none: the tokenizer's and the template's."""
    eos: Any = tokenizer.eos_token_id
    ends = set[int]() if eos is None else {int(eos)}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if tokenizer.chat_template is not None:
        with suppress(RowError):  # a template may need more than these messages
            [turn] = tokenize_row({"messages": chat}, tokenizer, config.data)
            ends |= special & {*(turn.completion or [])[-1:]}
    if not ends:
        _log.warning(
            "student: %s has no eos_token_id in its generation_config, config, tokenizer or chat template, "
            "so that every completion has rollouts.max_completion_length tokens",
            config.student,
        )
    return tuple(sorted(ends))
