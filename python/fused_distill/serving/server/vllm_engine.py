"""A vLLM engine in the teacher server's process."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...huggingface.loading import load_tokenizer, tokenizer_fingerprint
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import ScoringOptions, TokenSequence
from .transformers_engine import TeacherInfo


class VllmEngine:
    """Any model of vLLM, through the prompt log-probabilities of `vllm.LLM`.

    vLLM gives its own top tokens at temperature 1: no score_ids, no other temperature, no hidden states.
    A prompt that several sequences share runs for each: vLLM's prefix cache holds no log-probabilities.

    Args:
        llm: a vllm.LLM with max_logprobs=-1 or as many as clients will ask for; nothing else may use it.
        tokenizer: of transformers; None: the model has none.
        name: what clients see. None: the model's path.
    """

    head_file = None

    def __init__(self, llm: Any, tokenizer: Any | None = None, name: str | None = None):
        self.llm = llm
        config = llm.model_config
        self.info = TeacherInfo(
            name or config.model,
            config.get_vocab_size(),
            config.max_model_len - 1,  # vLLM insists on generating a token
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            (),
        )

    @classmethod
    def load(
        cls, name: str, dtype: str, max_length: int | None = None, options: dict[str, Any] | None = None
    ) -> VllmEngine:
        """From a local path or a hub name.

        Args:
            name: local path or hub name.
            dtype: "auto" or a torch dtype's name.
            max_length: longest sequence. None: the model's.
            options: further arguments of vllm.LLM, say {"tensor_parallel_size": 4}.

        Raises:
            ImportError: without vLLM.
        """
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("the vllm engine needs vLLM beside this package: pip install vllm") from error
        tokenizer = load_tokenizer(name)
        llm = LLM(
            **{
                "model": name,
                "dtype": dtype,
                "max_logprobs": -1,
                "max_model_len": None if max_length is None else max_length + 1,
                "skip_tokenizer_init": tokenizer is None,
                **(options or {}),
            }
        )
        return cls(llm, tokenizer, name)

    def score(self, batch: list[TokenSequence], execution: ScoringOptions) -> list[TeacherLogprobs]:
        """All sequences handed to vLLM at once, which schedules them as it likes."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=execution.top_logprobs,
            flat_logprobs=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": list(sequence.tokens)} for sequence in batch]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [_answer(s, output.prompt_logprobs) for s, output in zip(batch, outputs, strict=True)]

    def close(self) -> None:
        """End vLLM's processes, which would outlive a server that dies of SIGTERM."""
        self.llm.llm_engine.engine_core.shutdown()


def _answer(sequence: TokenSequence, flat: Any) -> TeacherLogprobs:
    """From vLLM's FlatLogprobs: per token but the first its own log-probability, then the top K."""
    before = len(sequence.tokens) - 1
    width = len(flat.logprobs) // before if before else 1
    first = (sequence.start - 1) * width
    logprobs = np.array(flat.logprobs[first:], dtype=np.float32).reshape(-1, width)
    ids = np.array(flat.token_ids[first:], dtype=np.int32).reshape(-1, width)
    lengths = np.array([sequence.positions], dtype=np.int64)
    return TeacherLogprobs(lengths, logprobs[:, 1:], ids[:, 1:], logprobs[:, 0])
