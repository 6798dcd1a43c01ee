"""The wire format: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from cases import INTERPRETED
from fused_distill.serving.protocol import logprobs as wire
from fused_distill.serving.protocol.logprobs import TeacherLogprobs
from fused_distill.serving.protocol.packing import WireError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

FORMS = {
    "binary": (wire.encode_binary, wire.decode_binary),
    "base64": (lambda a: json.dumps(wire.encode_base64(a)), lambda text: wire.decode_json(json.loads(text))),
    "json": (lambda a: json.dumps(wire.encode_json(a)), lambda text: wire.decode_json(json.loads(text))),
}


@st.composite
def answers(draw: st.DrawFn) -> TeacherLogprobs:
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    k, m, positions = draw(st.integers(0, 4)), draw(st.integers(0, 3)), sum(lengths)
    numbers = st.one_of(st.just(-np.inf), st.floats(-1e4, 0, width=16))

    def floats(*shape: int) -> Any:
        return draw(arrays.arrays(np.float32, shape, elements=numbers))

    return TeacherLogprobs(
        np.array(lengths, dtype=np.int64),
        floats(positions, k),
        draw(arrays.arrays(np.int32, (positions, k), elements=st.integers(0, 2**31 - 1))),
        floats(positions),
        floats(positions, m) if draw(st.booleans()) else None,
    )


def assert_same(got: TeacherLogprobs, want: TeacherLogprobs) -> None:
    for name in ("lengths", "logprobs", "ids", "actual_logprobs", "score_logprobs"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@given(answer=answers())
def test_every_form_carries_every_field(form: str, answer: TeacherLogprobs) -> None:
    encode, decode = FORMS[form]
    assert_same(decode(encode(answer)), answer)


@given(answers())
def test_float16_keeps_what_float16_can_hold(answer: TeacherLogprobs) -> None:
    assert_same(wire.decode_binary(wire.encode_binary(answer, "float16")), answer)


@given(answers())
def test_split_and_join_are_inverse(answer: TeacherLogprobs) -> None:
    parts = answer.split()
    assert [len(p.actual_logprobs) for p in parts] == answer.lengths.tolist()
    if parts:
        assert_same(TeacherLogprobs.join(parts), answer)


@given(answers(), st.data())
def test_a_truncated_or_longer_payload_is_rejected(answer: TeacherLogprobs, data: st.DataObject) -> None:
    payload = wire.encode_binary(answer)
    cut = data.draw(st.integers(0, len(payload) - 1))
    for wrong in (payload[:cut], payload + bytes(data.draw(st.integers(1, 9)))):
        with pytest.raises(WireError):
            wire.decode_binary(wrong)


@given(answers(), st.data())
def test_a_corrupted_payload_is_rejected(answer: TeacherLogprobs, data: st.DataObject) -> None:
    payload = bytearray(wire.encode_binary(answer))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        wire.decode_binary(bytes(payload))


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_binary(payload)


@given(
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.integers(0, 3), max_size=3),
    st.data(),
)
def test_random_numbers_in_a_fitting_frame_are_an_answer_or_rejected(
    code: int, k: int, m: int, lengths: list[int], data: st.DataObject
) -> None:
    positions, size = sum(lengths), 4 >> min(code, 1)
    count = positions * (k * (size + 4) + size * (1 + m))
    body = struct.pack("<3sBBBHHI", b"FDT", 1, code, m > 0, k, m, len(lengths))
    body += np.array(lengths, "<u4").tobytes() + data.draw(st.binary(min_size=count, max_size=count))
    try:
        answer = wire.decode_binary(body + struct.pack("<I", zlib.crc32(body)))
    except WireError:
        return
    assert answer.lengths.tolist() == lengths
    assert (answer.ids >= 0).all()
    assert not (answer.logprobs == np.inf).any()


@pytest.mark.parametrize("n", [1, 2**31, 2**32 - 1])
def test_counts_beyond_the_payload_take_no_memory(n: int) -> None:
    forged = struct.pack("<3sBBBHHI", b"FDT", 1, 0, 0, 65535, 0, n) + struct.pack("<I", 2**32 - 1)
    with pytest.raises(WireError):
        wire.decode_binary(forged + struct.pack("<I", zlib.crc32(forged)))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_other_json_is_rejected(content: object) -> None:
    with pytest.raises(WireError):
        wire.decode_json(content)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [10**5000, -(10**5000), 1e300, -1e300, float("nan"), float("inf"), 2**31, -1, "1", [], {}]
    ),
)


def changed(content: Any, data: st.DataObject) -> Any:
    """The content with something strange at a random place in it."""
    if isinstance(content, (dict, list)) and content and data.draw(st.integers(0, 3)):
        copy = content.copy()
        keys = sorted(content) if isinstance(content, dict) else range(len(content))
        key = data.draw(st.sampled_from(keys))
        copy[key] = changed(content[key], data)
        return copy
    return data.draw(STRANGE)


@pytest.mark.parametrize("form", ["json", "base64"])
@given(answer=answers(), data=st.data())
def test_json_with_anything_changed_is_rejected_or_still_an_answer(
    form: str, answer: TeacherLogprobs, data: st.DataObject
) -> None:
    content = (wire.encode_json if form == "json" else wire.encode_base64)(answer)
    try:
        decoded = wire.decode_json(changed(content, data))
    except WireError:
        return
    assert decoded.lengths.sum() == len(decoded.actual_logprobs)
    assert (decoded.ids >= 0).all()
    assert not (decoded.logprobs == np.inf).any()


def test_float16_never_makes_an_entry_absent() -> None:
    answer = TeacherLogprobs(
        np.array([1]),
        np.full((1, 1), -1e6, np.float32),
        np.zeros((1, 1), np.int32),
        np.full(1, -1e6, np.float32),
    )
    got = wire.decode_binary(wire.encode_binary(answer, "float16"))
    assert got.logprobs.item() == got.actual_logprobs.item() == -65504


def test_parts_without_positions_join_with_any() -> None:
    empty = TeacherLogprobs(
        np.array([0]), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    )
    full = TeacherLogprobs(
        np.array([1]), np.zeros((1, 2), np.float32), np.ones((1, 2), np.int32), np.zeros(1, np.float32)
    )
    joined = TeacherLogprobs.join([empty, full, empty])
    assert joined.lengths.tolist() == [0, 1, 0]
    assert joined.ids.tolist() == [[1, 1]]


def test_another_version_is_named() -> None:
    answer = TeacherLogprobs(
        np.array([0]), np.zeros((0, 1), np.float32), np.zeros((0, 1), np.int32), np.zeros(0, np.float32)
    )
    payload = bytearray(wire.encode_binary(answer))
    payload[3] = 2
    with pytest.raises(WireError, match="version must be 1, got 2"):
        wire.decode_binary(bytes(payload))
    with pytest.raises(WireError, match="version must be 1, got 7"):
        wire.decode_json({**wire.encode_json(answer), "version": 7})


def test_merging_answers_with_and_without_scores_is_an_error() -> None:
    with_scores, without = (
        TeacherLogprobs(
            np.array([1]),
            np.zeros((1, 2), np.float32),
            np.zeros((1, 2), np.int32),
            np.zeros(1, np.float32),
            np.zeros((1, 3), np.float32) if scores else None,
        )
        for scores in (True, False)
    )
    with pytest.raises(WireError, match="all answers must carry score_logprobs or none"):
        TeacherLogprobs.join([with_scores, without])
