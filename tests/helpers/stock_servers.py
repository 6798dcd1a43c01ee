"""Stand-ins for stock inference servers: the endpoints that the client uses, around a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse


def stock_vllm(model: Any) -> FastAPI:
    """Return vLLM's OpenAI server for a model, with its --max-model-len 64 and --max-logprobs 20."""
    app = FastAPI()

    @app.get("/v1/models")
    def _() -> Any:
        return {"data": [{"id": "stock", "max_model_len": 64}]}

    @app.post("/v1/completions")
    async def _(request: Request) -> Any:
        body = await request.json()
        k = body["prompt_logprobs"]
        if k > 20:
            return JSONResponse({"error": {"message": "prompt logprobs: max allowed: 20"}}, 400)
        rows = [_prompt_logprobs(model, tokens, k) for tokens in body["prompt"]]
        return {"choices": [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]}

    return app


def stock_sglang(model: Any, context: int = 64, old: bool = False) -> FastAPI:
    """Return SGLang 0.5.23's native server for a model. `app.state.requests` has the bodies of /generate.

    What it does follows SGLang's sources: managers/io_struct.py (requests), managers/tokenizer_manager.py and
    managers/scheduler_components/logprob_result_processor.py (answers), managers/schedule_batch.py
    (log-probabilities begin after the token logprob_start_len), managers/tp_worker.py (longest sequence).

    Args:
        model: a transformers model.
        context: SGLang's --context-length.
        old: have the names that endpoints had before.
    """
    app = FastAPI()
    app.state.requests = []

    @app.get("/v1/models")
    def _() -> Any:
        adapter = {"id": "adapter", "owned_by": "sglang", "parent": "stock", "max_model_len": None}
        base = {"id": "stock", "owned_by": "sglang", "parent": None, "max_model_len": context}
        return {"data": [base, adapter]}

    @app.get("/get_server_info" if old else "/server_info")
    def _() -> Any:
        return {"version": "0.5.23", "max_req_input_len": context - 6}

    @app.post("/generate")
    async def _(request: Request) -> Any:
        body = await request.json()
        app.state.requests.append(body)
        assert body["return_logprob"]
        assert body["sampling_params"]["max_new_tokens"] == 0
        chosen = body.get("token_ids_logprob") or [None] * len(body["input_ids"])
        answers = []
        for tokens, start, ids in zip(body["input_ids"], body["logprob_start_len"], chosen, strict=True):
            if len(tokens) >= context - 6:
                message = f"Input length ({len(tokens)} tokens) exceeds the maximum allowed length"
                return JSONResponse({"error": {"message": message}}, 400)
            info = _meta_info(model, tokens, start, body["top_logprobs_num"], ids)
            answers.append({"text": "", "meta_info": info})
        return answers

    return app


def _logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def _prompt_logprobs(model: Any, tokens: list[int], k: int) -> list[Any]:
    positions: list[Any] = [None]
    for row, actual in zip(_logprobs(model, tokens), tokens[1:], strict=False):
        ranked = row.argsort(descending=True).tolist()
        kept = {*ranked[:k], actual}
        positions.append({str(t): {"logprob": row[t].item(), "rank": ranked.index(t) + 1} for t in kept})
    return positions


def _meta_info(model: Any, tokens: list[int], start: int, k: int, ids: list[int] | None) -> dict[str, Any]:
    rows = _logprobs(model, tokens)[start:-1]

    def triples(row: torch.Tensor, chosen: list[int]) -> list[Any]:
        return [(row[t].item() if row[t].isfinite() else None, t, None) for t in chosen]

    actual = [triples(row, [token])[0] for row, token in zip(rows, tokens[start + 1 :], strict=True)]
    info: dict[str, Any] = {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(tokens),
        "input_token_logprobs": [(None, tokens[start], None), *actual],
        "input_top_logprobs": [None, *(triples(row, row.topk(k).indices.tolist()) for row in rows)],
    }
    if ids is not None:
        info["input_token_ids_logprobs"] = [None, *(triples(row, ids) for row in rows)]
    return info
