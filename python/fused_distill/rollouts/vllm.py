"""Rollouts by vLLM, on a stock server (needs the extra `client`) or in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serving.client.retry import RetryingClient, RetryPolicy, ServerError
from ..serving.protocol.openai import first_model
from .base import Completion, Sampling, checked_prompts

if TYPE_CHECKING:
    import httpx

_CONCURRENCY = 32  # requests in flight; the server batches them
_TOKEN_BYTES, _COMPLETION_BYTES = (
    1024,
    16 << 10,
)  # an answer's bytes are at most so many per token and completion
_CACHE_KEPT = "vLLM did not reset its prefix cache; it refuses while requests run"


class VllmRollouts(AbstractContextManager["VllmRollouts"]):
    """See RolloutEngine. A stock vLLM server generates; weights are synchronised from disk.

    Args:
        url: one server. `sync_from_disk` requires that it runs with VLLM_SERVER_DEV_MODE=1.
        token: bearer token.
        model: model name. None: the first that the server lists.
        timeout_seconds: limit between two bytes of a response.
        deadline_seconds: limit of one call, all attempts together.
        batch_size: prompts per request.
        retries: see RetryPolicy.
        transport: httpx transport.
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
            url,
            token=token,
            timeout_seconds=timeout_seconds,
            retries=retries,
            transport=transport,
            concurrency=_CONCURRENCY,
        )

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
        # vLLM seeds completion j of every prompt of a request with seed + j, so equal prompts in one request
        # would get equal completions. With a seed, every prompt goes in a request of its own.
        size = self.batch_size if sampling.seed is None else 1

        def request(start: int) -> list[Completion]:
            batch = slice(start, start + size)
            body = {
                "model": model,
                "prompt": prompts[batch],
                **_vllm_options(sampling, start),
                # Override the model's generation_config.json: rollouts are samples of the model itself.
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "min_p": 0.0,
                "return_token_ids": True,
            }

            def decode(response: httpx.Response) -> list[Completion]:
                choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
                expected = sampling.n * len(prompts[batch])
                if len(choices) != expected:
                    raise ServerError(f"the answer has {len(choices)} completions, expected {expected}")
                completions: list[Completion] = []
                for i, choice in enumerate(choices, start * sampling.n):
                    group, prompt = groups[i // sampling.n], prompts[i // sampling.n]
                    logprobs, reason = choice["logprobs"]["token_logprobs"], choice["finish_reason"]
                    completions.append(_completion(group, prompt, choice["token_ids"], logprobs, reason))
                return completions

            tokens = sum(map(len, prompts[batch])) + len(prompts[batch]) * sampling.max_tokens
            max_bytes = sampling.n * (_TOKEN_BYTES * tokens + _COMPLETION_BYTES * len(prompts[batch]))
            return self._http.send("POST", "/v1/completions", deadline, decode, body, max_bytes=max_bytes)

        parts = self._http.run([partial(request, start) for start in range(0, len(prompts), size)])
        return [completion for part in parts for completion in part]

    def sync_from_disk(self, folder: Path | str) -> None:
        """Load the weights of a checkpoint into the server and reset its prefix cache.

        Args:
            folder: a checkpoint that the server can read too.

        Raises:
            FileNotFoundError: the folder does not exist.
            ServerError: the server refused, e.g. because it runs without VLLM_SERVER_DEV_MODE=1, or kept its
                cache, as it does while requests run.
        """
        call = {"method": "reload_weights", "kwargs": {"weights_path": _checkpoint(folder)}}
        deadline = time.monotonic() + self.deadline_seconds
        self._http.send("POST", "/collective_rpc", deadline, lambda _: None, call)
        self._http.send("POST", "/reset_prefix_cache", deadline, check_reset)


class VllmInProcessRollouts:
    """See RolloutEngine. A vLLM engine in this process generates; weights are synchronised from disk.

    Args:
        llm: a vllm.LLM. Nothing else may use it at the same time.
    """

    def __init__(self, llm: Any):
        self.llm = llm

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        from vllm import SamplingParams  # pyright: ignore

        prompts, groups = checked_prompts(prompts, groups)
        params = [SamplingParams(detokenize=False, **_vllm_options(sampling, i)) for i in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        completions: list[Completion] = []
        for prompt, group, output in zip(prompts, groups, outputs, strict=True):
            for generated in output.outputs:
                tokens = list(generated.token_ids)
                steps = zip(tokens, generated.logprobs, strict=True)
                logprobs = [step[token].logprob for token, step in steps]
                completions.append(_completion(group, prompt, tokens, logprobs, generated.finish_reason))
        return completions

    def sync_from_disk(self, folder: Path | str) -> None:
        """Load the weights of a checkpoint and reset the prefix cache.

        Raises:
            FileNotFoundError: the folder does not exist.
            ServerError: vLLM did not reset its cache.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": _checkpoint(folder)})
        if not self.llm.reset_prefix_cache():
            raise ServerError(_CACHE_KEPT)


def check_reset(response: httpx.Response) -> None:
    """Raise ValueError, for another attempt, if /reset_prefix_cache answered that the cache was kept."""
    if not response.json()["success"]:
        raise ValueError(_CACHE_KEPT)


def _checkpoint(folder: Path | str) -> str:
    path = Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"folder must hold a checkpoint, got {path}")
    return str(path)


def _vllm_options(sampling: Sampling, prompt: int) -> dict[str, Any]:
    """Return the options under vLLM's names, which are ours; the seed depends on the prompt's position."""
    seed = None if sampling.seed is None else sampling.seed + prompt * sampling.n
    return {**vars(sampling), "seed": seed, "logprobs": 0}


def _completion(
    group: int, prompt: list[int], tokens: list[int], logprobs: list[float], reason: Any
) -> Completion:
    if reason not in ("stop", "length") or len(tokens) != len(logprobs):
        raise ServerError(f"a completion of prompt {prompt[:8]}... is incomplete: it ended by {reason!r}")
    return Completion(group, prompt, tokens, logprobs, reason)
