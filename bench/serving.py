"""Bytes and milliseconds per position of teacher servers: binary and JSON responses and stock vLLM's JSON.

    make bench-serving
    FUSED_DISTILL_VLLM_PYTHON=PYTHON python bench/serving.py [--output FILE] [--small]

The model is a random Llama of two layers, so that the path from its log-probabilities to the client's arrays
dominates; at V 32000 the LM head alone takes most of the time of a binary response. A request has 8 sequences
of 257 tokens, 2048 positions. Times are medians of five on an idle server, from the request's body to arrays.
Without FUSED_DISTILL_VLLM_PYTHON, a Python with vLLM and this package, only the transformers engine runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
import transformers
from fused_distill.serving.protocol.hidden_states import decode_hidden
from fused_distill.serving.protocol.logprobs import decode_binary
from fused_distill.serving.protocol.openai import openai_answer, openai_request
from fused_distill.serving.protocol.request import SCORE_PATH, ScoringOptions, TokenSequence
from fused_distill.serving.server.transformers_engine import TransformersEngine
from servers import running
from suite import header, results_folder, write_json
from tokenizers import Tokenizer, models, pre_tokenizers

SUPPORTS = (1, 16, 64, 256)
VOCABS = (2048, 32000)
HIDDEN, LENGTH, SEQUENCES, ROUNDS = 128, 257, 8, 5
TITLE = "{} per position, V {}, {} positions in a request"


class Endpoint(NamedTuple):
    """A server's endpoint: its request and how the response is decoded."""

    name: str
    path: str
    body: Callable[[list[list[int]], int], dict[str, Any]]
    decode: Callable[[httpx.Response], object]


def json_arrays(response: httpx.Response) -> list[object]:
    """The arrays of a JSON response whose sequences have equal lengths."""
    content = response.json()
    return [np.array(content[name], np.float32) for name in ("logprobs", "ids", "actual_logprobs")]


def own_server(engine: str, form: str, dtype: str = "float32") -> Endpoint:
    def body(sequences: list[list[int]], k: int) -> dict[str, Any]:
        request = {"sequences": sequences, "prompt_lengths": [1] * len(sequences), "top_logprobs": k}
        return {**request, "response_format": form, "dtype": dtype}

    read = (lambda r: decode_binary(r.content)) if form == "binary" else json_arrays
    label = f"{form} {dtype}" if form == "binary" else "JSON"
    return Endpoint(f"fused-distill, {engine}, {label}", SCORE_PATH, body, read)


def stock_vllm(model: str, sequences: list[list[int]]) -> Endpoint:
    def decode(response: httpx.Response) -> object:
        content = response.json()
        k = len(content["choices"][0]["prompt_logprobs"][1]) - 1
        return openai_answer(content, sequences, [1] * len(sequences), k)

    return Endpoint("stock vLLM, JSON", "/v1/completions", lambda s, k: openai_request(model, s, k), decode)


def hidden_states() -> Endpoint:
    def body(sequences: list[list[int]], _: int) -> dict[str, Any]:
        request = {"sequences": sequences, "prompt_lengths": [1] * len(sequences)}
        return {**request, "response": "hidden_states", "response_format": "binary"}

    return Endpoint(
        "fused-distill, transformers, hidden states", SCORE_PATH, body, lambda r: decode_hidden(r.content)
    )


def measured(url: str, endpoint: Endpoint, sequences: list[list[int]], k: int) -> tuple[float, int]:
    """Median seconds and bytes of a response, after one request to warm up."""
    seconds, size = [], 0
    with httpx.Client(base_url=url, timeout=600) as http:
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            response = http.post(endpoint.path, json=endpoint.body(sequences, k))
            response.raise_for_status()
            endpoint.decode(response)
            seconds.append(time.perf_counter() - started)
            size = len(response.content)
    return statistics.median(seconds[1:]), size


def rows(folder: Path, vocab: int, supports: tuple[int, ...], length: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(0)
    sequences = generator.integers(3, vocab, (SEQUENCES, length)).tolist()
    positions = SEQUENCES * (length - 1)
    with_vllm, name = os.environ.get("FUSED_DISTILL_VLLM_PYTHON"), str(folder)
    command = ["-m", "fused_distill.cli", "serve-teacher", name, "--dtype", "float32"]
    servers = [([sys.executable, *command], [own_server("transformers", "binary"), hidden_states()])]
    if with_vllm:
        options = ["--engine", "vllm", "--max-length", "511", "--engine-options", '{"enforce_eager": true}']
        endpoints = [
            own_server("vLLM", "binary"),
            own_server("vLLM", "binary", "float16"),
            own_server("vLLM", "json"),
        ]
        servers.append(([with_vllm, *command, *options], endpoints))
        server = [with_vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", name]
        server += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-logprobs", "256"]
        servers.append(([*server, "--host", "127.0.0.1"], [stock_vllm(name, sequences)]))
    for arguments, endpoints in servers:
        with running(arguments, folder / "log", VLLM_CPU_KVCACHE_SPACE="1") as server:
            for endpoint in endpoints:
                for k in supports:
                    seconds, size = measured(server.url, endpoint, sequences, k)
                    of_k = {"case": endpoint.name, "provider": f"K {k}"}
                    for unit, value, text in (
                        ("Bytes", size / positions, f"{size / positions:.0f}"),
                        ("Milliseconds", 1e3 * seconds / positions, f"{1e3 * seconds / positions:.3f}"),
                    ):
                        yield {
                            "table": TITLE.format(unit, vocab, positions),
                            **of_k,
                            "value": value,
                            "text": text,
                        }
                    print(
                        f"{endpoint.name}, K {k}: {size / positions:.0f} bytes, {1e3 * seconds:.0f} ms",
                        flush=True,
                    )


def sharing_rows(folder: Path, vocab: int, length: int) -> Iterator[dict[str, Any]]:
    """Time of the forward pass, without LM head, of generations of one prompt: prompt once or each time."""
    engine = TransformersEngine.load(str(folder), "cpu", "float32")
    generator = np.random.default_rng(0)
    prompt, rests = (
        generator.integers(3, vocab, 3 * length // 4),
        generator.integers(3, vocab, (8, length // 4)),
    )
    batch = [TokenSequence((*prompt.tolist(), *rest.tolist()), len(prompt)) for rest in rests]
    title = f"8 generations of {length // 4} tokens for a prompt of {len(prompt)}, transformers, milliseconds"
    for provider, shared in (("prompt once", True), ("prompt each time", False)):
        engine.hidden_state_model.shares_prompts, seconds = shared, []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            engine.score(batch, ScoringOptions(0, None, 1.0, "hidden_states"))
            seconds.append(time.perf_counter() - started)
        value = 1e3 * statistics.median(seconds[1:])
        yield {
            "table": title,
            "case": "forward pass",
            "provider": provider,
            "value": value,
            "text": f"{value:.0f}",
        }


def save_model(folder: Path, vocab: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    # Stock vLLM returns the text of every token.
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(vocab)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word1")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    arguments = parser.parse_args()
    output = arguments.output or results_folder(arguments.small) / "serving.json"
    supports, length = ((1, 4), 9) if arguments.small else (SUPPORTS, LENGTH)
    results: list[dict[str, Any]] = []
    for vocab in VOCABS[:1] if arguments.small else VOCABS:
        with TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder, vocab)
            results += rows(folder, vocab, supports, length)
            if vocab == VOCABS[-1]:
                results += sharing_rows(folder, vocab, length)
    write_json(output, {**header(), "rows": results})
    print(output)


if __name__ == "__main__":
    main()
