"""Rollouts by a transformers model in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..huggingface.forward import evaluated
from .base import Completion, Sampling, checked_prompts
from .sampling import RandomStreams, sample


class TransformersRollouts:
    """See RolloutEngine. Completions come from the model's current weights, on its device.

    Nothing but `eos_token_id` is read from the model's generation_config. A completion depends on its prompt,
    the seed and its position among all completions; others in its batch change it by rounding only. A model
    that ignores the attention mask, as RWKV and BART's decoder do, sees the padding of shorter prompts in its
    batch: it needs prompts of one length, or batch_size 1.

    Args:
        model: a causal language model.
        batch_size: completions that are generated at the same time. Their prompts have similar lengths.
        synced: keep all processes in step, as a sharded model requires: every process runs as many forward
            passes as the process that needs the most. All processes must pass the same number of prompts.
    """

    def __init__(self, model: Any, batch_size: int = 32, synced: bool = False):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.batch_size, self.synced = model, batch_size, synced
        self.ends = end_tokens(model)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine. Without a seed, torch's random numbers give one.

        Raises:
            FloatingPointError: the model's logits are NaN or infinite.
        """
        prompts, groups = checked_prompts(prompts, groups)
        if sampling.seed is None:
            sampling = replace(sampling, seed=int(torch.randint(1 << 62, ())))
        sequences = sorted(range(len(prompts) * sampling.n), key=lambda i: len(prompts[i // sampling.n]))
        completions: dict[int, Completion] = {}
        with evaluated(self.model), _own_generation_config(self.model):
            for start in range(0, len(sequences), self.batch_size):
                batch = sequences[start : start + self.batch_size]
                rows = [prompts[i // sampling.n] for i in batch]
                for i, prompt, ended in zip(batch, rows, self._generate(rows, batch, sampling), strict=True):
                    completions[i] = Completion(groups[i // sampling.n], prompt, *ended)
        return [completions[i] for i in range(len(sequences))]

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], sequences: list[int], sampling: Sampling
    ) -> list[tuple[list[int], list[float], Any]]:
        """Return tokens, log-probabilities and finish reasons of one batch."""
        from transformers import GenerationConfig, LogitsProcessorList

        longest, device = max(map(len, prompts)), self.model.device
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        attention = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        streams = RandomStreams(sampling, sequences, device)
        ends = self.ends | {*sampling.stop_token_ids}
        logprobs: list[Tensor] = []

        def only_the_sampled(ids: Tensor, logits: Tensor) -> Tensor:
            """Sample here, and leave generate the choice of the single best token."""
            sampled = sample(logits, streams, sampling)
            logprobs.append(sampled.logprobs)
            return logits.fill_(-torch.inf).scatter_(-1, sampled.tokens[:, None], 0.0)

        output: Tensor = self.model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(attention, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=sorted(ends) or None,
            ),
            logits_processor=LogitsProcessorList([only_the_sampled]),  # pyright: ignore[reportArgumentType]
            synced_gpus=self.synced,
        )
        rows: list[list[int]] = output[:, longest:].tolist()
        steps: list[list[float]] = torch.stack(logprobs, -1).tolist()
        completions: list[tuple[list[int], list[float], Any]] = []
        for row, row_logprobs in zip(rows, steps, strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in ends), None)
            length = end or len(row)
            completions.append((row[:length], row_logprobs[:length], "stop" if end else "length"))
        return completions


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end a text according to the model's generation_config, or else its config."""
    for config in (model.generation_config, model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return {*ends} if isinstance(ends, list | tuple) else {int(ends)}
    return set()


@contextmanager
def _own_generation_config(model: Any) -> Generator[None, None, None]:
    """Take away the generation_config, from which `generate` fills in whatever it is not told."""
    from transformers import GenerationConfig

    # A PEFT model and the model that it wraps have the same one.
    kept = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    try:
        for module, _ in kept:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in kept:
            module.generation_config = config
