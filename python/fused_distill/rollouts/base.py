"""Completions of prompts behind one small interface, and those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

# Against what a model's generation_config.json may ask for: rollouts are samples of the model itself.
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Raises:
        ValueError: a field that does not fit, by name.
    """

    n: int = 1  # completions of each prompt
    max_tokens: int = 128
    temperature: float = 1.0  # 0: the likeliest token every time
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


class Completion(NamedTuple):
    """One completion. Those of one prompt share its group; nothing is assumed of their order."""

    group: int
    prompt: list[int]
    tokens: list[int]  # with the end-of-sequence token, if it ended so
    logprobs: list[float]  # of the tokens, before temperature, top_p and top_k; empty where not wanted
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    """Where completions come from."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """n completions of each prompt, prompt by prompt; groups default to the prompts' positions."""
        ...


class TransformersRollouts:
    """`generate` of a transformers model, on its device, with the weights that it has at the time.

    Args:
        model: a causal language model.
        batch_size: prompts, n times each, of one call.
        synced: every process runs as many passes as the one that needs the most, as a sharded model wants it;
            all of them must give as many prompts.
        logprobs: whether completions carry theirs. The logits of all steps are kept for them, 4 bytes times
            the vocabulary for every token of a batch.
    """

    def __init__(self, model: Any, batch_size: int = 32, synced: bool = False, logprobs: bool = True):
        self.model, self.batch_size, self.synced, self.logprobs = model, batch_size, synced, logprobs
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        prompts, groups = checked_prompts(prompts, groups)
        found: list[Completion] = []
        was_training = self.model.training
        self.model.eval()
        try:
            # One stream of random numbers for the whole call; the caller's goes on where it was.
            device = self.model.device
            devices = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                for start in range(0, len(prompts), self.batch_size):
                    batch = slice(start, start + self.batch_size)
                    found += self._batch(prompts[batch], groups[batch], sampling)
        finally:
            self.model.train(was_training)
        return found

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]], groups: list[int], sampling: Sampling) -> list[Completion]:
        longest = max(map(len, prompts))
        device = self.model.device
        rows = [[0] * (longest - len(p)) + p for p in prompts]
        attention = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": float(sampling.temperature),
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": 0.0,
            }
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(attention, device=device),
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.n,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=self.logprobs,
            **_PLAIN,
            synced_gpus=self.synced,
            **how,
        )
        tokens: Tensor = output.sequences[:, longest:]
        steps = [
            torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, i : i + 1])
            for i, logits in enumerate(output.logits or ())
        ]
        logprobs = torch.cat(steps, -1).tolist() if steps else [[]] * len(tokens)
        found: list[Completion] = []
        for i, row in enumerate(tokens.tolist()):
            end = next((t + 1 for t, token in enumerate(row) if token in self.ends), None)
            length = end or len(row)
            prompt = i // sampling.n
            reason = "stop" if end else "length"
            found.append(
                Completion(groups[prompt], prompts[prompt], row[:length], logprobs[i][:length], reason)
            )
        return found


def checked_prompts(
    prompts: Sequence[Sequence[int]], groups: Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    """Both as lists of int. Raises ValueError naming the one that does not fit, and its index."""
    rows = [[int(t) for t in prompt] for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"groups must be {len(rows)}, one a prompt, got {len(groups)}")
    return rows, list(range(len(rows))) if groups is None else [int(g) for g in groups]
