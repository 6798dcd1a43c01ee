"""Scoring by an SGLang server's /generate with return_logprob."""

from __future__ import annotations

from operator import index
from typing import Any

import httpx

from ..protocol.logprobs import TeacherLogprobs
from ..protocol.sglang import distinct_ids, sglang_abort, sglang_answer, sglang_request
from .request import ScoringRequest, TeacherError
from .stock import StockServer

# SGLang takes no sequence of more than its context length minus 7 tokens.
_RESERVED = 7


class StockSglang(StockServer):
    """See StockServer."""

    name, path = "SGLang", "/generate"
    title, scored, scores_ids = "an SGLang server", "the tokens of its input", True

    def details(self, deadline: float) -> dict[str, Any]:
        """Return what SGLang can do, and the longest sequence it takes, which /server_info limits."""
        for path in ("/server_info", "/get_server_info"):  # older servers have the second only
            longest = self._http.send_one("GET", path, deadline, _longest, accepted=(200, 404))
            if longest is not None:
                return {"capabilities": ["score_ids"], "max_length": longest}
        return {"capabilities": ["score_ids"]}

    def longest(self, deadline: float) -> tuple[int | None, str]:
        """See StockServer."""
        description = self.description(deadline)
        context = description.get("max_model_len")
        length = description.get("max_length", context and context - _RESERVED)
        return length, "the SGLang server's --context-length and memory allow no longer one"

    def body(self, asked: ScoringRequest, deadline: float) -> tuple[dict[str, Any], int]:
        """See StockServer."""
        body = sglang_request(asked.sequences, asked.prompt_lengths, asked.top_logprobs, asked.score_ids)
        description = self.description(deadline)
        if description.get("parent") is not None:  # an adapter
            body["lora_path"] = description["id"]
        chosen = distinct_ids(asked.sequences, asked.score_ids or [])
        scores = sum(n * len(ids) for n, ids in zip(asked.positions, chosen, strict=False))
        return body, asked.json_bytes(scores)

    def read(self, content: Any, asked: ScoringRequest) -> TeacherLogprobs:
        """See StockServer."""
        problem = sglang_abort(content)
        if problem is not None:
            raise TeacherError(f"the SGLang server ended a request: {problem}{self.advice(problem, asked)}")
        return sglang_answer(content, asked.top_logprobs, asked.score_ids)

    def advice(self, refusal: str, asked: ScoringRequest) -> str:
        """See StockServer."""
        if "context length" in refusal or "maximum allowed length" in refusal:
            return f". {self.restart(max(map(len, asked.sequences)))}"
        return ""

    def restart(self, tokens: int) -> str:
        """See StockServer."""
        context = tokens + _RESERVED
        return f"Start SGLang with --context-length {context} or more, and with memory for as many tokens"

    def parts_tokens(self, request: ScoringRequest, max_tokens: int) -> int:
        """See StockServer. Ids to score make answers so large that every sequence goes alone."""
        return max_tokens if request.score_ids is None else 1


def _longest(response: httpx.Response) -> int | None:
    """Return the number of tokens below the limit of a response, None if it has none."""
    limit = None if response.status_code == 404 else response.json().get("max_req_input_len")
    return None if limit is None else index(limit) - 1
