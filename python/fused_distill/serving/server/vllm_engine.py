"""Engine on vLLM in the teacher server's process."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

import numpy as np

from ...child_processes import end_children_with_this_process
from ...huggingface.fingerprint import checkpoint_fingerprint, local_checkpoint
from ...huggingface.loading import load_tokenizer, require_model, tokenizer_fingerprint
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import ScoringOptions, TokenSequence
from .engine import TeacherInfo, try_engine


class VllmEngine:
    """See TeacherEngine. Scores by the prompt log-probabilities of `vllm.LLM`.

    vLLM gives its own top tokens at temperature 1: no score_ids, no other temperature, no hidden states. A
    prompt shared by several sequences runs for each of them, because vLLM's prefix cache holds no
    log-probabilities.

    Args:
        llm: a vllm.LLM with max_logprobs=-1 or the largest K of any client. Nothing else may use it.
        tokenizer: its transformers tokenizer, for the fingerprint that clients compare. None: no fingerprint.
        name: the name that clients see. None: the model's path.

    Raises:
        ValueError: the model cannot score tokens.
    """

    head_file = None

    def __init__(self, llm: Any, tokenizer: Any | None = None, name: str | None = None):
        self.llm = llm
        config = llm.model_config
        folder = local_checkpoint(config.model, config.revision)
        self.info = TeacherInfo(
            name or config.model,
            config.get_vocab_size(),
            config.max_model_len - 1,  # vLLM always generates at least one token
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            capabilities=(),
            weights_fingerprint=None if folder is None else checkpoint_fingerprint(folder),
        )
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.device = str(llm.llm_engine.vllm_config.device_config.device_type)
        try_engine(self)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Check the names of further arguments of vllm.LLM.

        Raises:
            ImportError: vLLM is missing.
            ValueError: vLLM has no such argument, or the server sets it itself.
        """
        LLM, EngineArgs = _import_vllm("LLM", "EngineArgs")
        known = {field.name for field in fields(EngineArgs)} | {*signature(LLM.__init__).parameters}
        if unknown := sorted(options.keys() - (known - {"self", "kwargs", "model"})):
            raise ValueError(f"--engine-options must hold arguments of vllm.LLM, got {', '.join(unknown)}")

    @classmethod
    def load(
        cls, name: str, dtype: str, max_length: int | None = None, options: dict[str, Any] | None = None
    ) -> VllmEngine:
        """Load the model and the tokenizer of a local path or hub name.

        Args:
            name: local path or hub name.
            dtype: "auto" or the name of a torch dtype.
            max_length: length of the longest sequence. None: the model's.
            options: further arguments of vllm.LLM, e.g. {"tensor_parallel_size": 4}.

        Raises:
            ImportError: vLLM is missing.
            OSError: there is no such folder.
            ValueError: vLLM cannot load the model, or the model cannot score tokens.
        """
        (LLM,) = _import_vllm("LLM")
        require_model(name)
        tokenizer = load_tokenizer(name)
        settings: dict[str, Any] = {
            "dtype": dtype,
            "max_logprobs": -1,
            "max_model_len": None if max_length is None else max_length + 1,
            "skip_tokenizer_init": tokenizer is None,
            **(options or {}),
        }
        end_children_with_this_process()
        try:
            llm = LLM(name, **settings)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"vLLM cannot load {name}: {error}") from error
        return cls(llm, tokenizer, name)

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> list[TeacherLogprobs]:
        """See TeacherEngine. vLLM schedules the sequences itself.

        It gets no sequence without positions: it has no prompt log-probabilities of a single token.
        """
        scored = [sequence for sequence in batch if sequence.positions]
        if not scored:
            return [_empty(options.top_logprobs) for _ in batch]
        (SamplingParams,) = _import_vllm("SamplingParams")
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=options.top_logprobs,
            flat_logprobs=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": list(sequence.tokens)} for sequence in scored]
        outputs = iter(self.llm.generate(prompts, params, use_tqdm=False))
        return [
            _convert(s, next(outputs).prompt_logprobs) if s.positions else _empty(options.top_logprobs)
            for s in batch
        ]

    def close(self) -> None:
        """End vLLM's processes, which would outlive a server that is ended by SIGTERM."""
        self.llm.llm_engine.engine_core.shutdown()


def _import_vllm(*names: str) -> list[Any]:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the vllm engine needs vLLM in this environment: pip install vllm") from error
    return [getattr(vllm, name) for name in names]


def _empty(top_logprobs: int) -> TeacherLogprobs:
    """Return the answer for a sequence without positions."""
    numbers, ids = np.empty((0, top_logprobs), np.float32), np.empty((0, top_logprobs), np.int32)
    return TeacherLogprobs(np.zeros(1, np.int64), numbers, ids, np.empty(0, np.float32))


def _convert(sequence: TokenSequence, flat: Any) -> TeacherLogprobs:
    """Convert vLLM's FlatLogprobs, which hold per token but the first the actual token, then the top K."""
    width = len(flat.logprobs) // (len(sequence.tokens) - 1)
    first = (sequence.start - 1) * width
    logprobs = np.array(flat.logprobs[first:], dtype=np.float32).reshape(-1, width)
    ids = np.array(flat.token_ids[first:], dtype=np.int32).reshape(-1, width)
    lengths = np.array([sequence.positions], dtype=np.int64)
    return TeacherLogprobs(lengths, logprobs[:, 1:], ids[:, 1:], logprobs[:, 0])
