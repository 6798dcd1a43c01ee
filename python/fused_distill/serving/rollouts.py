"""Completions of prompts, sampled by transformers or by a vLLM server, behind one small interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import httpx
import torch
from torch import Tensor

from .openai_protocol import first_model
from .patient_http import PatientHttp, RetryPolicy, ServerError

_CONCURRENCY = 32  # requests to a vLLM server, which puts them into batches of its own


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
    logprobs: list[float]  # of the tokens, as the model gives them before temperature, top_p and top_k
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
    """

    def __init__(self, model: Any, batch_size: int = 32):
        self.model, self.batch_size = model, batch_size
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        prompts, groups = _checked(prompts, groups)
        found: list[Completion] = []
        was_training = self.model.training
        self.model.eval()
        try:
            # One stream of random numbers for the whole call; the caller's goes on where it was.
            with torch.random.fork_rng(enabled=sampling.seed is not None):
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
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(attention, device=device),
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.n,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **how,
        )
        tokens: Tensor = output.sequences[:, longest:]
        steps = [
            torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, i : i + 1])
            for i, logits in enumerate(output.logits)
        ]
        logprobs = torch.cat(steps, -1).tolist()
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


class VllmRollouts:
    """A stock vLLM server: token ids in and out, weights synchronised from disk.

    Args:
        url: one server. For `sync_from_disk` it must run with VLLM_SERVER_DEV_MODE=1.
        token: bearer token.
        model: the model's name. None: the first that the server lists.
        timeout_seconds: between two bytes of an answer.
        deadline_seconds: of one call, all attempts together.
        batch_size: prompts of one request.
        retries: see RetryPolicy.
        transport: of httpx.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        timeout_seconds: float = 600.0,
        deadline_seconds: float = 3600.0,
        batch_size: int = 256,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        self.deadline_seconds, self.batch_size = deadline_seconds, batch_size
        self._model = model
        self._http = PatientHttp(
            url, token=token, timeout_seconds=timeout_seconds, retries=retries, transport=transport
        )

    def __enter__(self) -> VllmRollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine.

        Raises:
            ServerError: the server gave no usable answer before the deadline.
        """
        prompts, groups = _checked(prompts, groups)
        deadline = time.monotonic() + self.deadline_seconds
        model = self._model or self._http.send("GET", "/v1/models", deadline, first_model)["id"]
        # vLLM seeds completion j of every prompt of a request with seed + j: prompts that repeat would repeat
        # their completions. Hence a request, and seeds of its own, for each prompt.
        size = self.batch_size if sampling.seed is None else 1

        def request(start: int) -> list[Completion]:
            batch = slice(start, start + size)
            body = {
                "model": model,
                "prompt": prompts[batch],
                "n": sampling.n,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": None if sampling.seed is None else sampling.seed + start * sampling.n,
                "logprobs": 0,
                "return_token_ids": True,
            }

            def decode(response: httpx.Response) -> list[Completion]:
                return _completions(response.json(), prompts[batch], groups[batch], sampling.n)

            return self._http.send("POST", "/v1/completions", deadline, decode, body)

        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            parts = list(pool.map(request, range(0, len(prompts), size)))
        return [completion for part in parts for completion in part]

    def sync_from_disk(self, folder: Path | str) -> None:
        """Make the server load the weights of `folder`, a checkpoint that the server can read.

        The prefix cache is emptied: what it holds was computed with the old weights.

        Raises:
            FileNotFoundError: no such folder.
            ServerError: the server refused, say for want of VLLM_SERVER_DEV_MODE=1.
        """
        path = Path(folder).resolve()
        if not path.is_dir():
            raise FileNotFoundError(f"folder must hold a checkpoint, got {path}")
        deadline = time.monotonic() + self.deadline_seconds
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        self._http.send("POST", "/collective_rpc", deadline, lambda _: None, call)
        self._http.send("POST", "/reset_prefix_cache", deadline, lambda _: None)


def _checked(
    prompts: Sequence[Sequence[int]], groups: Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    rows = [[int(t) for t in prompt] for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"groups must be {len(rows)}, one a prompt, got {len(groups)}")
    return rows, list(range(len(rows))) if groups is None else [int(g) for g in groups]


def _completions(
    content: dict[str, Any], prompts: list[list[int]], groups: list[int], n: int
) -> list[Completion]:
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    if len(choices) != n * len(prompts):
        raise ServerError(f"the answer has {len(choices)} completions, expected {n * len(prompts)}")
    found: list[Completion] = []
    for i, choice in enumerate(choices):
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
        if reason not in ("stop", "length") or len(tokens) != len(logprobs):
            raise ServerError(f"completion {i} is not whole: it ended by {reason!r}")
        found.append(Completion(groups[i // n], prompts[i // n], tokens, logprobs, reason))
    return found
