"""Rollouts by vLLM, on a stock server (needs the extra `client`) or in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..huggingface.fingerprint import checkpoint_fingerprint
from ..serving.client.retry import RetryingClient, RetryPolicy, ServerError
from ..serving.protocol.openai import first_model, openai_answer, openai_request
from .base import Completion, Sampling, checked_prompts
from .weights import (
    Checkpoint,
    Shapes,
    TokenLogprobs,
    WeightsCheck,
    WeightsError,
    loaded_shapes,
    probe_tokens,
)

if TYPE_CHECKING:
    import httpx

_CONCURRENCY = 32  # requests in flight; the server batches them
_TOKEN_BYTES, _COMPLETION_BYTES = (
    1024,
    16 << 10,
)  # an answer's bytes are at most so many per token and completion
MOST_FORBIDDEN = 1024  # tokens that a request excludes one by one
_CACHE_KEPT = "vLLM did not reset its prefix cache; it refuses while requests run"
_NAME_WEIGHTS_PATH, _VERSION_PATH = "/update_weight_version", "/weight_info"  # since vLLM 0.32
_LOADING_ADVICE = (
    "The server must run with VLLM_SERVER_DEV_MODE=1 and read the folder under the same path. If loading "
    "failed half-way, its engine has ended: see the server's log and restart it"
)


class VllmRollouts(AbstractContextManager["VllmRollouts"]):
    """See RolloutEngine. A stock vLLM server generates; weights are synchronised from disk.

    Once weights were synchronised, every call of `generate` ends with a check that the server still has them:
    one that was restarted meanwhile has the weights of its start.

    Args:
        url: one server. `sync_from_disk` requires that it runs with VLLM_SERVER_DEV_MODE=1.
        token: bearer token.
        model: model name. None: the first that the server lists.
        vocab_size: of the model's config. It must be known if `Sampling.vocab_size` is set.
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
        vocab_size: int | None = None,
        timeout_seconds: float = 600.0,
        deadline_seconds: float = 3600.0,
        batch_size: int = 256,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        self.deadline_seconds, self.batch_size = deadline_seconds, batch_size
        self._model, self._vocab_size = model, vocab_size
        self._weights = WeightsCheck()
        self._version: str | None = None  # of the weights received last, if the server keeps such a version
        self._shapes: Shapes | None = None  # of the model that the server loaded, if they can be known
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
            WeightsError: a kind of ServerError; the server has other weights than it received last.
        """
        prompts, groups = checked_prompts(prompts, groups)
        sampling, copies = _asked(sampling)
        deadline = time.monotonic() + self.deadline_seconds
        model = self._model_name(deadline)
        # vLLM seeds completion j of every prompt of a request with seed + j, so equal prompts in one request
        # would get equal completions. With a seed, every prompt goes in a request of its own.
        size = self.batch_size if sampling.seed is None else 1

        def request(start: int) -> list[Completion]:
            batch = slice(start, start + size)
            body = {
                "model": model,
                "prompt": prompts[batch],
                **_vllm_options(sampling, start, self._vocab_size),
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
        # After the requests: a server that was restarted before or amid them has its first weights now.
        self._check_unchanged(deadline)
        return [completion for part in parts for completion in part for _ in range(copies)]

    def sync_from_disk(self, folder: Path | str, expected: TokenLogprobs | None = None) -> None:
        """Load the weights of a checkpoint into the server and reset its prefix cache.

        Args:
            folder: a checkpoint that the server can read too.
            expected: log-probabilities by the model that was saved, see `model_logprobs`; the server's are
                compared with them. None: the server's answer to later calls is compared with its first one.

        Raises:
            FileNotFoundError, ValueError: the folder holds no checkpoint, or one of another model. It was not
                sent.
            ServerError: the server refused, e.g. because it runs without VLLM_SERVER_DEV_MODE=1, or kept its
                cache, as it does while requests run.
            WeightsError: a kind of ServerError; the server's log-probabilities are not the expected ones.
        """
        deadline = time.monotonic() + self.deadline_seconds
        checkpoint = Checkpoint.read(folder)
        path = checkpoint.path
        reference = expected or TokenLogprobs(probe_tokens(checkpoint.vocab_size), [])
        like = self._shapes or self._loaded_shapes(deadline)
        if like is not None:
            checkpoint.check_shapes(like)

        def loaded(response: httpx.Response) -> None:
            if response.status_code != 200:  # another attempt would end the same way
                answer = f"{response.status_code} {response.text[:500]}"
                raise ServerError(f"vLLM did not load {path}: {answer}. {_LOADING_ADVICE}")

        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        refused = (400, 403, 404, 405, 422, 500)
        self._http.send("POST", "/collective_rpc", deadline, loaded, call, accepted=(200, *refused))
        self._http.send("POST", "/reset_prefix_cache", deadline, check_reset)
        body = {"new_version": checkpoint_fingerprint(path)}
        self._http.send("POST", _NAME_WEIGHTS_PATH, deadline, lambda _: None, body, accepted=(200, 404))
        self.verify_weights(reference)
        self._shapes = checkpoint.shapes

    def verify_weights(self, expected: TokenLogprobs) -> None:
        """Check that the server has a model's weights; later calls of `generate` check that it keeps them.

        Args:
            expected: the model's log-probabilities, see `model_logprobs`. Without log-probabilities the
                server's own are taken.

        Raises:
            WeightsError: the server's log-probabilities are not the expected ones.
            ServerError: the server gave no usable answer before the deadline.
        """
        deadline = time.monotonic() + self.deadline_seconds
        got = self._logprobs(expected.tokens, deadline)
        self._weights.received(expected if expected.logprobs else None, got)
        self._version = self._weights_version(deadline)

    def _check_unchanged(self, deadline: float) -> None:
        sent = self._weights.sent
        if sent is None:
            return
        self._weights.unchanged(self._logprobs(sent.tokens, deadline))
        version = self._weights_version(deadline)
        if version != self._version:
            raise WeightsError(
                f"vLLM's weights have the version {version!r}, not {self._version!r} that it received last: "
                "the server was restarted, or something else changed its weights"
            )

    def _logprobs(self, tokens: list[int], deadline: float) -> TokenLogprobs:
        body = openai_request(self._model_name(deadline), [tokens], 0)

        def decode(response: httpx.Response) -> TokenLogprobs:
            answer = openai_answer(response.json(), [tokens], [0], 0)
            if len(answer.actual_logprobs) != len(tokens) - 1:
                raise ValueError(f"the answer has {len(answer.actual_logprobs)} log-probabilities")
            return TokenLogprobs(tokens, answer.actual_logprobs.tolist())

        return self._http.send("POST", "/v1/completions", deadline, decode, body)

    def _weights_version(self, deadline: float) -> str | None:
        """Return the version that vLLM keeps of its weights, or None if it keeps none, as before 0.32."""

        def decode(response: httpx.Response) -> str | None:
            return str(response.json()["weight_version"]) if response.status_code == 200 else None

        return self._http.send("GET", _VERSION_PATH, deadline, decode, accepted=(200, 404))

    def _model_name(self, deadline: float) -> str:
        return self._model or self._http.send("GET", "/v1/models", deadline, first_model)["id"]

    def _loaded_shapes(self, deadline: float) -> Shapes | None:
        """Return the shapes of the model that the server loaded at its start, if its files are here too."""
        root = self._http.send("GET", "/v1/models", deadline, first_model).get("root")
        return loaded_shapes(str(root))


class VllmInProcessRollouts:
    """See RolloutEngine. A vLLM engine in this process generates; weights are synchronised from disk.

    Args:
        llm: a vllm.LLM. Nothing else may use it at the same time.
        vocab_size: of the model's config. It must be known if `Sampling.vocab_size` is set.
    """

    def __init__(self, llm: Any, vocab_size: int | None = None):
        self.llm, self._vocab_size = llm, vocab_size
        self._weights = WeightsCheck()
        self._shapes: Shapes | None = None  # of the model that vLLM loaded, if they can be known

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, groups: Sequence[int] | None = None
    ) -> list[Completion]:
        """See RolloutEngine."""
        from vllm import SamplingParams  # pyright: ignore

        prompts, groups = checked_prompts(prompts, groups)
        sampling, copies = _asked(sampling)
        options = [_vllm_options(sampling, i, self._vocab_size) for i in range(len(prompts))]
        params = [SamplingParams(detokenize=False, **one) for one in options]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        completions: list[Completion] = []
        for prompt, group, output in zip(prompts, groups, outputs, strict=True):
            for generated in output.outputs:
                tokens = list(generated.token_ids)
                steps = zip(tokens, generated.logprobs, strict=True)
                logprobs = [step[token].logprob for token, step in steps]
                completion = _completion(group, prompt, tokens, logprobs, generated.finish_reason)
                completions += [completion] * copies
        return completions

    def sync_from_disk(self, folder: Path | str, expected: TokenLogprobs | None = None) -> None:
        """Load the weights of a checkpoint and reset the prefix cache.

        Args:
            folder: a checkpoint.
            expected: log-probabilities by the model that was saved, see `model_logprobs`; vLLM's are compared
                with them. None: they are not compared.

        Raises:
            FileNotFoundError, ValueError: the folder holds no checkpoint, or one of another model.
            ServerError: vLLM did not reset its cache; WeightsError if its log-probabilities are not the
                expected ones.
        """
        checkpoint, config = Checkpoint.read(folder), self.llm.model_config
        like = self._shapes or loaded_shapes(config.model, config.revision)
        if like is not None:
            checkpoint.check_shapes(like)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint.path)})
        if not self.llm.reset_prefix_cache():
            raise ServerError(_CACHE_KEPT)
        if expected is not None:
            self._weights.received(expected, self._logprobs(expected.tokens))
        self._shapes = checkpoint.shapes

    def _logprobs(self, tokens: list[int]) -> TokenLogprobs:
        from vllm import SamplingParams  # pyright: ignore

        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        steps = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return TokenLogprobs(tokens, [step[token].logprob for token, step in steps])


def check_reset(response: httpx.Response) -> None:
    """Raise ValueError, for another attempt, if /reset_prefix_cache answered that the cache was kept."""
    if not response.json()["success"]:
        raise ValueError(_CACHE_KEPT)


def _asked(sampling: Sampling) -> tuple[Sampling, int]:
    """Return what to ask vLLM for, and how often a completion counts: it refuses n greedy ones."""
    return (sampling, 1) if sampling.temperature else (replace(sampling, n=1), sampling.n)


def _vllm_options(sampling: Sampling, prompt: int, vocab_size: int | None) -> dict[str, Any]:
    """Return the options under vLLM's names, which are ours; the seed depends on the prompt's position."""
    options: dict[str, Any] = vars(sampling) | {"stop_token_ids": [*sampling.stop_token_ids], "logprobs": 0}
    if sampling.seed is not None:
        options["seed"] = sampling.seed + prompt * sampling.n
    del options["vocab_size"]
    common = sampling.vocab_size
    if common is not None:
        if vocab_size is None:
            raise ValueError("vocab_size of the model must be given to the engine if Sampling.vocab_size is")
        if vocab_size - common > MOST_FORBIDDEN:
            raise ValueError(
                f"Sampling.vocab_size must be at most {MOST_FORBIDDEN} below the model's {vocab_size} with "
                f"vLLM, which excludes tokens one by one, got {common}"
            )
        if common < vocab_size:
            options["logit_bias"] = dict.fromkeys(range(common, vocab_size), -100.0)
    return options


def _completion(
    group: int, prompt: list[int], tokens: list[int], logprobs: list[float], reason: Any
) -> Completion:
    if reason not in ("stop", "length") or len(tokens) != len(logprobs):
        raise ServerError(f"a completion of prompt {prompt[:8]}... is incomplete: it ended by {reason!r}")
    return Completion(group, prompt, tokens, logprobs, reason)
