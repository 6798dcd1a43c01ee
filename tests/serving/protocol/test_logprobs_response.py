"""Binary and JSON responses with log-probabilities."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from fused_distill.serving.protocol.json_form import json_pieces
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary, encode_binary
from fused_distill.serving.protocol.packing import WireError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from serving_cases import (
    assert_same_response,
    from_json,
    logprob_responses,
    one_position,
)


@given(logprob_responses())
def test_float16_keeps_numbers_that_it_represents_exactly(answer: TeacherLogprobs) -> None:
    assert_same_response(decode_binary(encode_binary(answer, "float16")), answer)


@given(logprob_responses())
def test_split_and_join_are_inverse(answer: TeacherLogprobs) -> None:
    parts = answer.split()
    assert [len(p.actual_logprobs) for p in parts] == answer.lengths.tolist()
    if parts:
        assert_same_response(TeacherLogprobs.join(parts), answer)


@given(logprob_responses(), st.data())
def test_a_truncated_or_longer_payload_is_rejected(answer: TeacherLogprobs, data: st.DataObject) -> None:
    payload = encode_binary(answer)
    cut = data.draw(st.integers(0, len(payload) - 1))
    for wrong in (payload[:cut], payload + bytes(data.draw(st.integers(1, 9)))):
        with pytest.raises(WireError):
            decode_binary(wrong)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_binary(payload)


def test_float16_keeps_finite_numbers_finite() -> None:
    answer = TeacherLogprobs(
        np.array([1]),
        np.full((1, 1), -1e6, np.float32),
        np.zeros((1, 1), np.int32),
        np.full(1, -1e6, np.float32),
    )
    got = decode_binary(encode_binary(answer, "float16"))
    assert got.logprobs.item() == got.actual_logprobs.item() == -65504


def test_parts_without_positions_join_with_any_k() -> None:
    empty = TeacherLogprobs(
        np.array([0]), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    )
    full = TeacherLogprobs(
        np.array([1]), np.zeros((1, 2), np.float32), np.ones((1, 2), np.int32), np.zeros(1, np.float32)
    )
    joined = TeacherLogprobs.join([empty, full, empty])
    assert joined.lengths.tolist() == [0, 1, 0]
    assert joined.ids.tolist() == [[1, 1]]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_joined_responses_all_carry_score_logprobs_or_none_does(with_scores: list[bool]) -> None:
    parts = [
        TeacherLogprobs(
            np.array([1]),
            np.full((1, 2), -i, np.float32),
            np.zeros((1, 2), np.int32),
            np.full(1, -i, np.float32),
            np.full((1, 3), -i, np.float32) if scores else None,
        )
        for i, scores in enumerate(with_scores)
    ]
    if len(set(with_scores)) == 2:
        with pytest.raises(WireError, match="all responses must carry score_logprobs or none, got a mixture"):
            TeacherLogprobs.join(parts)
    else:
        for got, want in zip(TeacherLogprobs.join(parts).split(), parts, strict=True):
            assert_same_response(got, want)


@given(logprob_responses())
def test_binary_and_json_carry_the_same_fields(answer: TeacherLogprobs) -> None:
    assert_same_response(decode_binary(encode_binary(answer)), answer)
    assert_same_response(from_json(json.loads(b"".join(json_pieces(answer)))), answer)


def test_binary_and_json_carry_the_lowest_float32() -> None:
    lowest = float(np.finfo(np.float32).min)  # as masked logits often have
    answer = decode_binary(one_position(logprob=lowest, actual=lowest).content)
    assert_same_response(from_json(json.loads(b"".join(json_pieces(answer)))), answer)


def example() -> dict[str, torch.Tensor]:
    """The tensors of a valid response: 3 positions of 2 sequences, K 2, M 1."""
    return {
        "lengths": torch.tensor([2, 1], dtype=torch.int32),
        "logprobs": torch.full((3, 2), -1.0),
        "ids": torch.ones(3, 2, dtype=torch.int32),
        "actual_logprobs": torch.full((3,), -2.0),
        "score_logprobs": torch.full((3, 1), -3.0),
    }


def test_a_binary_response_is_a_safetensors_file_with_the_documented_tensors() -> None:
    tensors = example()
    answer = decode_binary(save(tensors, {"version": "1"}))
    assert answer.lengths.tolist() == [2, 1]
    for name in ("logprobs", "ids", "actual_logprobs", "score_logprobs"):
        np.testing.assert_array_equal(getattr(answer, name), tensors[name].numpy())
    again = load(encode_binary(answer))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


INVALID_TENSORS = {
    "lengths of another sum": {"lengths": torch.tensor([2, 2], dtype=torch.int32)},
    "negative length": {"lengths": torch.tensor([4, -1], dtype=torch.int32)},
    "lengths of int64": {"lengths": torch.tensor([2, 1])},
    "lengths of two dimensions": {"lengths": torch.tensor([[2, 1]], dtype=torch.int32)},
    "lengths without a dimension": {"lengths": torch.tensor(3, dtype=torch.int32)},
    "ids of int64": {"ids": torch.ones(3, 2, dtype=torch.int64)},
    "ids of another K": {"ids": torch.ones(3, 1, dtype=torch.int32)},
    "negative ids": {"ids": -torch.ones(3, 2, dtype=torch.int32)},
    "logprobs of float64": {"logprobs": torch.zeros(3, 2, dtype=torch.float64)},
    "logprobs of bfloat16": {"logprobs": torch.zeros(3, 2, dtype=torch.bfloat16)},
    "two dtypes": {"logprobs": torch.zeros(3, 2, dtype=torch.float16)},
    "infinite logprobs": {"logprobs": torch.full((3, 2), torch.inf)},
    "logprobs of one dimension": {"logprobs": torch.zeros(6)},
    "logprobs without a dimension": {"logprobs": torch.tensor(0.0)},
    "logprobs of three dimensions": {"logprobs": torch.zeros(3, 2, 1)},
    "too few actual_logprobs": {"actual_logprobs": torch.zeros(2)},
    "actual_logprobs of two dimensions": {"actual_logprobs": torch.zeros(3, 1)},
    "too many score_logprobs": {"score_logprobs": torch.zeros(4, 1)},
    "a further tensor": {"other": torch.zeros(1)},
}


@pytest.mark.parametrize("change", INVALID_TENSORS.values(), ids=INVALID_TENSORS.keys())
def test_tensors_that_do_not_fit_are_rejected(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WireError):
        decode_binary(save({**example(), **change}, {"version": "1"}))


@pytest.mark.parametrize("name", ["lengths", "logprobs", "ids", "actual_logprobs"])
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = example()
    del tensors[name]
    with pytest.raises(WireError, match=name):
        decode_binary(save(tensors, {"version": "1"}))


@pytest.mark.parametrize("metadata", [None, {}, {"version": "1", "head_sha256": "ab" * 32}])
def test_other_metadata_is_rejected(metadata: dict[str, str] | None) -> None:
    with pytest.raises(WireError):
        decode_binary(save(example(), metadata))


def test_another_version_is_named() -> None:
    with pytest.raises(WireError, match="version must be 1, got 7"):
        decode_binary(save(example(), {"version": "7"}))


def payload_of_header(header: object, data: bytes = b"") -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def tensor_info(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"logprobs": tensor_info("F32", [2**40, 2], 0, 2**43)},
        {"logprobs": tensor_info("F32", [2**63, 2**63], 0, 4)},
        {"logprobs": tensor_info("F32", [2, 2], 0, 4)},
        {"logprobs": tensor_info("F32", [1, 1], 4, 8)},
        {"logprobs": tensor_info("F32", [1, 1], 4, 0)},
        {"logprobs": tensor_info("F32", [-1, -1], 0, 4)},
        {"logprobs": tensor_info("F32", [1, 1], 0, 4), "ids": tensor_info("I32", [1, 1], 0, 4)},
        {"logprobs": tensor_info("F32", [0, 2**62], 0, 0), "ids": tensor_info("I32", [0, 2**63], 0, 4)},
        {"logprobs": tensor_info("F32", [0, 2**62, 2**62], 0, 0), "ids": tensor_info("I32", [1], 0, 4)},
        {"logprobs": tensor_info("X99", [1, 1], 0, 4)},
        {"logprobs": tensor_info("F4", [8], 0, 4)},
        {"__metadata__": {"version": 1}},
        {"__metadata__": []},
        {"__metadata__": None},
        [],
        None,
    ],
)
def test_a_header_that_does_not_fit_its_payload_is_rejected(header: object) -> None:
    if isinstance(header, dict):
        header = {"__metadata__": {"version": "1"}, **header}
    with pytest.raises(WireError):
        decode_binary(payload_of_header(header, bytes(4)))


def test_a_wide_response_without_positions_takes_no_memory() -> None:
    header = {"__metadata__": {"version": "1"}, "actual_logprobs": tensor_info("F32", [0], 0, 0)}
    header |= {"lengths": tensor_info("I32", [0], 0, 0), "logprobs": tensor_info("F32", [0, 2**40], 0, 0)}
    answer = decode_binary(payload_of_header({**header, "ids": tensor_info("I32", [0, 2**40], 0, 0)}))
    assert answer.logprobs.nbytes == answer.ids.nbytes == 0


@given(logprob_responses(), st.data())
def test_a_changed_payload_is_rejected_or_still_a_valid_response(
    answer: TeacherLogprobs, data: st.DataObject
) -> None:
    payload = bytearray(encode_binary(answer))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_binary(bytes(payload))
    except WireError:
        return
    assert changed.lengths.sum() == len(changed.actual_logprobs)
    assert (changed.ids >= 0).all()
    assert not (changed.logprobs == np.inf).any()
