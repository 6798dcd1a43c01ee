"""Completions by vLLM, on a stock server or in process, and the student's weights on their way there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from ..serving.client.retry import RetryingClient, RetryPolicy, ServerError
from ..serving.protocol.openai import first_model
from .base import Completion, Sampling, checked_prompts

# Against what a model's generation_config.json may ask for: rollouts are samples of the model itself.
_PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
_CONCURRENCY = 32  # requests to a server, which puts them into batches of its own


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
        self._http = RetryingClient(
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
        prompts, groups = checked_prompts(prompts, groups)
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
                "seed": _seed(sampling, start),
                **_PLAIN,
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
            ServerError: the server refused, say for want of VLLM_SERVER_DEV_MODE=1, or kept its cache, as it
                does while requests run.
        """
        path = _checkpoint(folder)
        deadline = time.monotonic() + self.deadline_seconds
        call = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self._http.send("POST", "/collective_rpc", deadline, lambda _: None, call)
        self._http.send("POST", "/reset_prefix_cache", deadline, check_emptied)


class VllmInProcessRollouts:
    """A vLLM engine in this process.

    Args:
        llm: a vllm.LLM; nothing else may use it meanwhile.
    """

    def __init__(self, llm: Any):
        self.llm = llm

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        prompts, groups = checked_prompts(prompts, groups)
        params = [
            SamplingParams(
                n=sampling.n,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=_seed(sampling, i),
                logprobs=0,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        found: list[Completion] = []
        for prompt, group, output in zip(prompts, groups, outputs, strict=True):
            for one in output.outputs:
                tokens = list(one.token_ids)
                steps = zip(tokens, one.logprobs, strict=True)
                logprobs = [step[token].logprob for token, step in steps]
                found.append(_completion(group, prompt, tokens, logprobs, one.finish_reason))
        return found

    def sync_from_disk(self, folder: Path | str) -> None:
        """Load the weights of `folder`, a checkpoint; the prefix cache is emptied.

        Raises:
            FileNotFoundError: no such folder.
            ServerError: vLLM would not empty its cache.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": _checkpoint(folder)})
        if not self.llm.reset_prefix_cache():
            raise ServerError("vLLM kept its prefix cache, as it does while requests run")


def check_emptied(response: httpx.Response) -> None:
    """Of /reset_prefix_cache. Raises ValueError, for another attempt, where the cache was kept."""
    if not response.json()["success"]:
        raise ValueError("vLLM kept its prefix cache, as it does while requests run")


def _checkpoint(folder: Path | str) -> str:
    path = Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"folder must hold a checkpoint, got {path}")
    return str(path)


def _seed(sampling: Sampling, prompt: int) -> int | None:
    """vLLM seeds completion j of a prompt with seed + j; every prompt has seeds of its own."""
    return None if sampling.seed is None else sampling.seed + prompt * sampling.n


def _completions(
    content: dict[str, Any], prompts: list[list[int]], groups: list[int], n: int
) -> list[Completion]:
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    if len(choices) != n * len(prompts):
        raise ServerError(f"the answer has {len(choices)} completions, expected {n * len(prompts)}")
    found: list[Completion] = []
    for i, choice in enumerate(choices):
        logprobs, reason = choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        found.append(_completion(groups[i // n], prompts[i // n], choice["token_ids"], logprobs, reason))
    return found


def _completion(
    group: int, prompt: list[int], tokens: list[int], logprobs: list[float], reason: Any
) -> Completion:
    if reason not in ("stop", "length") or len(tokens) != len(logprobs):
        raise ServerError(f"a completion of prompt {prompt[:8]}... is not whole: it ended by {reason!r}")
    return Completion(group, prompt, tokens, logprobs, reason)
