"""Fuzzing of everything that parses bytes from the network: `python tests/fuzz_wire.py -runs=100000`.

An input's first byte chooses what parses the rest. Only `WireError` (answers) and `RequestError` (requests)
may come out, and an answer that was decoded must survive each of the three forms. Needs atheris; arguments
are libFuzzer's.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

atheris: Any = import_module("atheris")  # there for some platforms only, and without types

with atheris.instrument_imports(include=["fused_distill.serving"]):
    from fused_distill.serving.protocol import logprobs as wire
    from fused_distill.serving.protocol.hidden_states import HiddenStates, decode_hidden, encode_hidden
    from fused_distill.serving.protocol.logprobs import TeacherLogprobs
    from fused_distill.serving.protocol.packing import WireError
    from fused_distill.serving.server.app import RequestError, ServerLimits, parsed
    from fused_distill.serving.server.transformers_engine import TeacherInfo

FIELDS = ("lengths", "logprobs", "ids", "actual_logprobs", "score_logprobs")


def example(lengths: list[int], k: int, m: int | None) -> TeacherLogprobs:
    """An answer of random numbers."""
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


ANSWERS = [
    example(lengths, k, m)
    for lengths, k, m in (([2, 0, 1], 2, 1), ([0], 1, 0), ([1], 0, None), ([3], 3, None), ([], 0, 0))
]
LEAST = np.full((1, 1), np.finfo(np.float32).min)  # a finite number, as that of a masked token often is
ANSWERS.append(TeacherLogprobs(np.array([1]), LEAST, np.zeros((1, 1), np.int32), LEAST[0], LEAST))
JSON_ANSWERS = [wire.encode_json(answer) for answer in ANSWERS]
JSON_ANSWERS += [wire.encode_base64(answer, "float16") for answer in ANSWERS]
ASKED: dict[str, Any] = {"sequences": [[1, 2, 3], [4]], "prompt_lengths": [1, 0]}
MORE: list[dict[str, Any]] = [
    {},
    {"top_logprobs": 5, "temperature": 0.5, "response_format": "binary", "dtype": "float16"},
    {"score_ids": [[[1, 2], [3, 4]], []]},
    {"score_ids": None, "vocab_size": 9, "response_format": "base64"},
]
STRANGE = [
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


def seeds() -> list[bytes]:
    """Valid payloads of every kind, each behind the byte of its target."""
    found = [b"\2" + json.dumps(content).encode() for content in JSON_ANSWERS]
    found += [b"\4" + json.dumps({**ASKED, **more}).encode() for more in MORE]
    for answer in ANSWERS:
        for dtype in ("float32", "float16"):
            whole = wire.encode_binary(answer, dtype)
            found += [b"\0" + whole, b"\1" + whole[:-4], b"\3" + whole[:-4]]
    for dtype in ("float32", "bfloat16"):
        hidden = HiddenStates(np.array([2, 0]), torch.ones(2, 3), "ab" * 32)
        found.append(b"\10" + encode_hidden(hidden, dtype)[:-4])
    return found + [bytes([target]) + bytes(range(1, 80)) for target in (5, 6, 7)]


# What `parsed` asks of an engine.
TEACHER: Any = SimpleNamespace(info=TeacherInfo("none", 100, 50, None), head_file=None)


def assert_survives(answer: TeacherLogprobs) -> None:
    """The answer is the same after each form."""
    for form, again in (
        ("binary", wire.decode_binary(wire.encode_binary(answer))),
        ("json", wire.decode_json(json.loads(json.dumps(wire.encode_json(answer))))),
        ("base64", wire.decode_json(json.loads(json.dumps(wire.encode_base64(answer))))),
    ):
        for name in FIELDS:
            got, want = getattr(again, name), getattr(answer, name)
            same = got is want is None or np.array_equal(got, want, equal_nan=got.dtype.kind == "f")
            if not same:
                raise AssertionError(f"{name} changed in the {form} form: {want} to {got}")


def binary(data: bytes) -> None:
    """The binary form as it is."""
    answer_or_error(lambda: wire.decode_binary(data))


def binary_with_checksum(data: bytes) -> None:
    """The binary form behind a CRC-32 that fits, which random changes never have."""
    answer_or_error(lambda: wire.decode_binary(data + struct.pack("<I", zlib.crc32(data))))


def json_form(data: bytes) -> None:
    """The JSON and base64 forms."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    answer_or_error(lambda: wire.decode_json(content))


def base64_form(data: bytes) -> None:
    """The base64 form around bytes, with a CRC-32 that fits."""
    whole = base64.b64encode(data + struct.pack("<I", zlib.crc32(data))).decode()
    answer_or_error(lambda: wire.decode_json({"version": 1, "binary": whole}))


def framed(data: bytes) -> None:
    """Any numbers behind a header that fits them."""
    provider = atheris.FuzzedDataProvider(data)
    code, has_scores, k, m = (provider.ConsumeIntInRange(0, most) for most in (1, 1, 3, 3))
    lengths = [provider.ConsumeIntInRange(0, 3) for _ in range(provider.ConsumeIntInRange(0, 3))]
    size, m = 4 >> code, m * has_scores
    count = sum(lengths) * (k * (size + 4) + size * (1 + m))
    body = struct.pack("<3sBBBHHI", b"FDT", 1, code, has_scores, k, m, len(lengths))
    body += struct.pack(f"<{len(lengths)}I", *lengths) + provider.ConsumeBytes(count).ljust(count, b"\0")
    binary_with_checksum(body)


def json_changed(data: bytes) -> None:
    """A valid JSON form with a few places changed."""
    provider = atheris.FuzzedDataProvider(data)
    content = changed(provider.PickValueInList(JSON_ANSWERS), provider)
    answer_or_error(lambda: wire.decode_json(content))


def request_changed(data: bytes) -> None:
    """A valid request with a few places changed."""
    provider = atheris.FuzzedDataProvider(data)
    content = changed({**ASKED, **provider.PickValueInList(MORE)}, provider)
    request(json.dumps(content).encode())


def changed(content: Any, provider: Any) -> Any:
    """A copy with up to three places replaced, taken out or doubled."""
    content = copy.deepcopy(content)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        place = content
        while place:
            key = provider.PickValueInList(sorted(place) if isinstance(place, dict) else [*range(len(place))])
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and provider.ConsumeIntInRange(0, 3):
                place = inner
                continue
            what = provider.ConsumeIntInRange(0, 5)
            if what == 0:
                del place[key]
            elif what == 1 and isinstance(place, list):
                place.append(copy.deepcopy(inner))
            else:
                place[key] = strange(provider)
            break
    return content


def strange(provider: Any) -> Any:
    """A value of any kind."""
    kind = provider.ConsumeIntInRange(0, 4)
    if kind == 0:
        return provider.ConsumeIntInRange(-2, 100)
    if kind == 1:
        return provider.ConsumeFloat()
    if kind == 2:
        return provider.ConsumeUnicode(8)
    return copy.deepcopy(provider.PickValueInList(STRANGE))


def hidden_with_checksum(data: bytes) -> None:
    """Hidden states behind a CRC-32 that fits."""
    try:
        hidden = decode_hidden(data + struct.pack("<I", zlib.crc32(data)))
    except WireError:
        return
    again = decode_hidden(encode_hidden(hidden, "float32" if data[4] == 0 else "bfloat16"))
    assert again.head_sha256 == hidden.head_sha256
    assert torch.equal(again.states.view(torch.uint8), hidden.states.view(torch.uint8))


def request(data: bytes) -> None:
    """A request's body."""
    try:
        asked, sequences, execution = parsed(data, TEACHER, ServerLimits())
    except RequestError as refused:
        if refused.response.status_code != 422:
            raise
        return
    assert [list(s.tokens) for s in sequences] == asked.sequences
    assert execution.top_logprobs == asked.top_logprobs
    # A request that was understood says the same when it is said again.
    again = parsed(asked.model_dump_json().encode(), TEACHER, ServerLimits())
    assert again[1:] == (sequences, execution)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    binary,
    binary_with_checksum,
    json_form,
    base64_form,
    request,
    framed,
    json_changed,
    request_changed,
    hidden_with_checksum,
)


def answer_or_error(decode: Callable[[], TeacherLogprobs]) -> None:
    """Nothing but `WireError` comes out; an answer survives every form."""
    try:
        answer = decode()
    except WireError:
        return
    assert_survives(answer)


def one_input(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


TOKENS = (
    *("null", "true", "NaN", "Infinity", "-1", "1e300", "3.3e38", "2147483648", "[]", "{}", ",", "[", "]"),
    *(
        '"version":1',
        '"binary":"',
        '"k":',
        '"m":',
        '"lengths":[',
        '"logprobs":[[[',
        '"ids":[[[',
        '"score_ids":[[[',
    ),
    *(
        '"actual_logprobs":[[',
        '"score_logprobs":[[[',
        '"sequences":[[',
        '"prompt_lengths":[',
        '"temperature":',
    ),
)


def main() -> None:
    """Run libFuzzer with this command's arguments on seeds and a dictionary of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-wire-") as folder:
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
