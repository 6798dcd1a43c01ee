"""Fuzzing of everything that parses bytes from the network: `python tests/serving/protocol/fuzz_parsers.py`.

The first byte of an input chooses what parses the rest. Only `WireError` (responses) and `RequestError`
(requests) may be raised, and a response that was decoded must survive every form. Needs atheris; arguments
are libFuzzer's, e.g. -runs=100000.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
atheris: Any = import_module("atheris")  # exists for some platforms only, and without types

with atheris.instrument_imports(include=["fused_distill.serving"]):
    from fused_distill.serving.protocol.hidden_states import HiddenStates, decode_hidden, encode_hidden
    from fused_distill.serving.protocol.json_form import json_pieces
    from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary, encode_binary
    from fused_distill.serving.protocol.openai import openai_answer
    from fused_distill.serving.protocol.packing import WireError
    from fused_distill.serving.protocol.sglang import sglang_answer
    from fused_distill.serving.server.engine import TeacherInfo
    from fused_distill.serving.server.validation import RequestError, ServerLimits, parse_request
    from serving_cases import from_json

FIELDS = ("lengths", "logprobs", "ids", "actual_logprobs", "score_logprobs")


def example(lengths: list[int], k: int, m: int | None) -> TeacherLogprobs:
    """A response of random numbers."""
    generator, count = np.random.default_rng(0), sum(lengths)

    def numbers(*shape: int) -> Any:
        return -generator.exponential(2.0, shape).astype(np.float32)

    return TeacherLogprobs(
        np.array(lengths, np.int64),
        numbers(count, k),
        generator.integers(0, 100, (count, k)).astype(np.int32),
        numbers(count),
        None if m is None else numbers(count, m),
    )


RESPONSES = [
    example(lengths, k, m)
    for lengths, k, m in (([2, 0, 1], 2, 1), ([0], 1, 0), ([1], 0, None), ([3], 3, None), ([], 0, 0))
]
LOWEST = np.full((1, 1), np.finfo(np.float32).min)  # a finite number, as a masked token often has
RESPONSES.append(TeacherLogprobs(np.array([1]), LOWEST, np.zeros((1, 1), np.int32), LOWEST[0], LOWEST))
REQUEST: dict[str, Any] = {"sequences": [[1, 2, 3], [4]], "prompt_lengths": [1, 0]}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_logprobs": 5, "temperature": 0.5, "response_format": "binary", "dtype": "float16"},
    {"score_ids": [[[1, 2], [3, 4]], []]},
    {"score_ids": None, "vocab_size": 9, "response_format": "base64"},
]
POSITION = {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -1.5, "rank": 2}}
VLLM = {"choices": [{"index": 0, "prompt_logprobs": [None, POSITION, POSITION]}]}
TRIPLES = [[-0.5, 7, None], [-1.5, 3, None]]
SGLANG_INFO = {
    "input_token_logprobs": [[None, 1, None], *TRIPLES],
    "input_top_logprobs": [None, TRIPLES, TRIPLES],
    "input_token_ids_logprobs": [None, TRIPLES, TRIPLES],
}
SGLANG = [{"meta_info": SGLANG_INFO}]
VALUES = [
    None,
    True,
    10**400,
    2**31,
    -1,
    1e300,
    -3.3e38,
    float("nan"),
    float("-inf"),
    "",
    [],
    {},
    [[]],
    [None],
]
SHA = "ab" * 32
# What `parse_request` reads of an engine.
TEACHER: Any = SimpleNamespace(info=TeacherInfo("none", 100, 50, None), head_file=None)


def binary_payloads() -> list[bytes]:
    return [encode_binary(response, dtype) for response in RESPONSES for dtype in ("float32", "float16")]


def hidden_payloads() -> list[bytes]:
    hidden = HiddenStates(np.array([2, 0]), torch.ones(2, 3), SHA)
    return [encode_hidden(hidden, dtype) for dtype in ("float32", "bfloat16")]


def assert_survives(response: TeacherLogprobs) -> None:
    """The response is the same after each form. JSON has no NaN, which the server never sends."""
    forms = {"binary": decode_binary(encode_binary(response))}
    if response.valid:
        forms["JSON"] = from_json(json.loads(b"".join(json_pieces(response))))
    for form, again in forms.items():
        for name in FIELDS:
            got, want = getattr(again, name), getattr(response, name)
            same = got is want is None or np.array_equal(got, want, equal_nan=got.dtype.kind == "f")
            if not same:
                raise AssertionError(f"{name} changed in the {form} form: {want} to {got}")


def logprobs(payload: bytes) -> None:
    """A binary response with log-probabilities."""
    try:
        response = decode_binary(payload)
    except WireError:
        return
    assert response.ids.size < 1 << 20
    assert_survives(response)


def hidden_states(payload: bytes) -> None:
    """A binary response with hidden states."""
    try:
        hidden = decode_hidden(payload)
    except WireError:
        return
    again = decode_hidden(encode_hidden(hidden, "float32" if hidden.states.itemsize == 4 else "bfloat16"))
    assert again.head_sha256 == hidden.head_sha256
    assert torch.equal(again.states.view(torch.uint8), hidden.states.view(torch.uint8))


def changed_header(payloads: list[bytes], decode: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A valid binary response with changes in the JSON of its header and its data cut or extended."""

    def target(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        payload = provider.PickValueInList(payloads)
        end = 8 + int.from_bytes(payload[:8], "little")
        header = json.dumps(changed(json.loads(payload[8:end]), provider)).encode()
        numbers = payload[end:][: len(payload) - provider.ConsumeIntInRange(0, 8)]
        decode(struct.pack("<Q", len(header)) + header + numbers + provider.ConsumeBytes(8))

    return target


def changed_numbers(payloads: list[bytes], decode: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """A valid header with any numbers behind it."""

    def target(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        payload = provider.PickValueInList(payloads)
        end = 8 + int.from_bytes(payload[:8], "little")
        decode(payload[:end] + provider.ConsumeBytes(len(payload) - end).ljust(len(payload) - end, b"\0"))

    return target


def request(body: bytes) -> None:
    """A request's body."""
    try:
        parsed, sequences, options = parse_request(body, TEACHER, ServerLimits())
    except RequestError as error:
        if error.response.status_code != 422:
            raise
        return
    assert [list(s.tokens) for s in sequences] == [tokens.tolist() for tokens in parsed.sequences]
    assert options.top_logprobs == parsed.top_logprobs
    # The parsed request, serialised, is the same request.
    lists = {"sequences": [list(s.tokens) for s in sequences]}
    if parsed.score_ids is not None:
        lists["score_ids"] = [[ids.tolist() for ids in rows] for rows in parsed.score_ids]
    content = {**parsed.model_dump(exclude={"score_ids"} | lists.keys()), **lists}
    again = parse_request(json.dumps(content).encode(), TEACHER, ServerLimits())
    assert again[2] == options
    for a, b in zip(again[1], sequences, strict=True):
        assert (a.tokens, a.prompt_length) == (b.tokens, b.prompt_length)
        np.testing.assert_equal(a.score_ids, b.score_ids)


def changed_request(data: bytes) -> None:
    """A valid request with a few places changed."""
    provider = atheris.FuzzedDataProvider(data)
    content = changed({**REQUEST, **provider.PickValueInList(OPTIONS)}, provider)
    request(json.dumps(content).encode())


def changed_vllm(data: bytes) -> None:
    """A stock vLLM server's response with a few places changed; the client retries these exceptions."""
    provider = atheris.FuzzedDataProvider(data)
    try:
        answer = openai_answer(changed(VLLM, provider), [[1, 7, 3]], [1], 2)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return
    assert answer.lengths.sum() == len(answer.actual_logprobs)


def changed_sglang(data: bytes) -> None:
    """An SGLang server's response with a few places changed; the client retries these exceptions."""
    provider = atheris.FuzzedDataProvider(data)
    try:
        answer = sglang_answer(changed(SGLANG, provider), 2, [[[7, 3], [3, 7]]])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return
    assert answer.lengths.sum() == len(answer.actual_logprobs)


def changed(content: Any, provider: Any) -> Any:
    """A copy with up to three places replaced, removed or doubled."""
    content = copy.deepcopy(content)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        place = content
        while place:
            key = provider.PickValueInList(sorted(place) if isinstance(place, dict) else [*range(len(place))])
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and provider.ConsumeIntInRange(0, 3):
                place = inner
                continue
            action = provider.ConsumeIntInRange(0, 5)
            if action == 0:
                del place[key]
            elif action == 1 and isinstance(place, list):
                place.append(copy.deepcopy(inner))
            else:
                place[key] = any_value(provider)
            break
    return content


def any_value(provider: Any) -> Any:
    """A value of any kind."""
    kind = provider.ConsumeIntInRange(0, 4)
    if kind == 0:
        return provider.ConsumeIntInRange(-2, 100)
    if kind == 1:
        return provider.ConsumeFloat()
    if kind == 2:
        return provider.ConsumeUnicode(8)
    return copy.deepcopy(provider.PickValueInList(VALUES))


TARGETS: tuple[Callable[[bytes], None], ...] = (
    logprobs,
    hidden_states,
    request,
    changed_header(binary_payloads(), logprobs),
    changed_header(hidden_payloads(), hidden_states),
    changed_numbers(binary_payloads(), logprobs),
    changed_numbers(hidden_payloads(), hidden_states),
    changed_request,
    changed_vllm,
    changed_sglang,
)


def one_input(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds() -> list[bytes]:
    """Valid payloads of every kind, each behind the byte of its target."""
    inputs = [b"\0" + payload for payload in binary_payloads()] + [b"\1" + p for p in hidden_payloads()]
    inputs += [b"\2" + json.dumps({**REQUEST, **options}).encode() for options in OPTIONS]
    return inputs + [bytes([target]) + bytes(range(1, 80)) for target in range(3, len(TARGETS))]


TOKENS = (
    *("null", "true", "NaN", "Infinity", "-1", "1e300", "3.3e38", "2147483648", "[]", "{}", ",", "[", "]"),
    *('"__metadata__":{"version":"1"}', '"dtype":"F16"', '"shape":[', '"data_offsets":[', '"lengths":{'),
    *(
        '"sequences":[[',
        '"prompt_lengths":[',
        '"temperature":',
        '"score_ids":[[[',
        '"response":"hidden_states"',
    ),
)


def main() -> None:
    """Run libFuzzer with this command's arguments on these seeds and tokens."""
    with tempfile.TemporaryDirectory(prefix="fuzz-parsers-") as folder:
        child = os.fork()  # libFuzzer ends its process without cleaning up
        if child:
            _, status = os.waitpid(child, 0)
            sys.exit(os.waitstatus_to_exitcode(status))
        corpus, dictionary = Path(folder, "corpus"), Path(folder, "dictionary")
        corpus.mkdir()
        for i, seed in enumerate(seeds()):
            one_input(seed)
            (corpus / f"seed-{i}").write_bytes(seed)
        dictionary.write_text("".join(json.dumps(token) + "\n" for token in TOKENS))
        atheris.Setup(
            [sys.argv[0], "-max_len=4096", f"-dict={dictionary}", *sys.argv[1:], str(corpus)], one_input
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
