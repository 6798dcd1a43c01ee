"""Scoring by a stock vLLM server's /v1/completions with prompt_logprobs."""

from __future__ import annotations

from typing import Any

from ..protocol.logprobs import TeacherLogprobs
from ..protocol.openai import openai_answer, openai_request
from .request import ScoringRequest
from .stock import StockServer


class StockVllm(StockServer):
    """See StockServer."""

    name, path = "vLLM", "/v1/completions"
    title, scored, scores_ids = "a stock vLLM server", "prompt log-probabilities", False

    def longest(self, deadline: float) -> tuple[int | None, str]:
        """See StockServer. vLLM always generates one token."""
        length = self.description(deadline).get("max_model_len")
        reason = f"the vLLM server's --max-model-len {length} includes one token that it generates"
        return (None if length is None else length - 1), reason

    def body(self, asked: ScoringRequest, deadline: float) -> tuple[dict[str, Any], int]:
        """See StockServer. The answer has the tokens of the prompts too."""
        model = self.description(deadline)["id"]
        return openai_request(model, asked.sequences, asked.top_logprobs), asked.json_bytes()

    def read(self, content: Any, asked: ScoringRequest) -> TeacherLogprobs:
        """See StockServer."""
        return openai_answer(content, asked.sequences, asked.prompt_lengths, asked.top_logprobs)

    def advice(self, refusal: str, asked: ScoringRequest) -> str:
        """See StockServer."""
        if "logprobs" in refusal and "max allowed" in refusal:
            return f". Start vLLM with --max-logprobs {asked.top_logprobs} or more"
        if "maximum context length" in refusal or "max_tokens must be at least 1" in refusal:
            return f". {self.restart(max(map(len, asked.sequences)))}"
        return ""

    def restart(self, tokens: int) -> str:
        """See StockServer."""
        return f"Start vLLM with --max-model-len {tokens + 1} or more"
