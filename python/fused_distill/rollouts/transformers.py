"""Rollouts by a transformers model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Completion, Sampling, checked_prompts


class TransformersRollouts:
    """See RolloutEngine. Completions come from the model's current weights, on its device.

    Args:
        model: a causal language model.
        batch_size: prompts per call of the model's `generate`, each with all of its completions.
        synced: keep all processes in step, as a sharded model requires: every process runs as many forward
            passes as the process that needs the most. All processes must pass the same number of prompts.
        logprobs: return the tokens' log-probabilities. This keeps the logits of all steps: 4 bytes times the
            vocabulary size per token of a batch.
    """

    def __init__(self, model: Any, batch_size: int = 32, synced: bool = False, logprobs: bool = True):
        self.model, self.batch_size, self.synced, self.logprobs = model, batch_size, synced, logprobs
        ends = model.generation_config.eos_token_id
        self.ends: set[int] = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        prompts, groups = checked_prompts(prompts, groups)
        completions: list[Completion] = []
        was_training = self.model.training
        self.model.eval()
        try:
            # The seed starts one random stream for the whole call; the caller's stream is not advanced.
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                for start in range(0, len(prompts), self.batch_size):
                    batch = slice(start, start + self.batch_size)
                    completions += self._generate_batch(prompts[batch], groups[batch], sampling)
        finally:
            self.model.train(was_training)
        return completions

    @torch.no_grad()
    def _generate_batch(
        self, prompts: list[list[int]], groups: list[int], sampling: Sampling
    ) -> list[Completion]:
        longest = max(map(len, prompts))
        device = self.model.device
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        attention = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        options: dict[str, Any] = {}
        if sampling.temperature > 0:
            options = {
                "temperature": float(sampling.temperature),
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": 0.0,
            }
        output = self.model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(attention, device=device),
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.n,
            do_sample=sampling.temperature > 0,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=self.logprobs,
            synced_gpus=self.synced,
            # Override the model's generation_config.json: rollouts are samples of the model itself.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            **options,
        )
        tokens: Tensor = output.sequences[:, longest:]
        rows: list[list[int]] = tokens.tolist()
        steps = [
            torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, i : i + 1])
            for i, logits in enumerate(output.logits or ())
        ]
        logprobs: list[list[float]] = torch.cat(steps, -1).tolist() if steps else [[]] * len(tokens)
        completions: list[Completion] = []
        for i, row in enumerate(rows):
            end = next((t + 1 for t, token in enumerate(row) if token in self.ends), None)
            length = end or len(row)
            group, prompt = groups[i // sampling.n], prompts[i // sampling.n]
            reason = "stop" if end else "length"
            completions.append(Completion(group, prompt, row[:length], logprobs[i][:length], reason))
        return completions
