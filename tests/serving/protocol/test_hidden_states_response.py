"""Binary responses with hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fused_distill.serving.protocol.hidden_states import HiddenStates, decode_hidden, encode_hidden
from fused_distill.serving.protocol.packing import WireError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

SHA = "ab" * 32


@st.composite
def hidden_states(draw: st.DrawFn, dtype: torch.dtype) -> HiddenStates:
    lengths = np.array(draw(st.lists(st.integers(0, 4), max_size=4)), dtype=np.int64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    states = torch.randn(int(lengths.sum()), draw(st.integers(1, 5)), generator=generator).to(dtype)
    return HiddenStates(lengths, states, SHA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_decoded_hidden_states_equal_the_encoded(dtype: Any, data: st.DataObject) -> None:
    sent = data.draw(hidden_states(getattr(torch, dtype)))
    got = decode_hidden(encode_hidden(sent, dtype))
    assert got.head_sha256 == sent.head_sha256
    np.testing.assert_array_equal(got.lengths, sent.lengths)
    assert torch.equal(got.states, sent.states)
    assert got.states.dtype == sent.states.dtype


@given(hidden_states(torch.bfloat16), st.data())
def test_a_truncated_or_longer_payload_is_rejected(sent: HiddenStates, data: st.DataObject) -> None:
    payload = encode_hidden(sent)
    cut = data.draw(st.integers(0, len(payload) - 1))
    for wrong in (payload[:cut], payload + bytes(data.draw(st.integers(1, 9)))):
        with pytest.raises(WireError):
            decode_hidden(wrong)


def example() -> dict[str, torch.Tensor]:
    """The tensors of a valid response: 3 positions of 2 sequences."""
    return {"lengths": torch.tensor([2, 1], dtype=torch.int32), "states": torch.ones(3, 4)}


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": torch.tensor([2, 2], dtype=torch.int32)},
        {"lengths": torch.tensor([4, -1], dtype=torch.int32)},
        {"lengths": torch.tensor([2, 1])},
        {"states": torch.ones(3)},
        {"states": torch.ones(3, 0)},
        {"states": torch.ones(3, 4, dtype=torch.float16)},
        {"logprobs": torch.ones(3, 4)},
    ],
)
def test_tensors_that_do_not_fit_are_rejected(change: dict[str, torch.Tensor]) -> None:
    assert decode_hidden(save(example(), {"version": "1", "head_sha256": SHA})).head_sha256 == SHA
    with pytest.raises(WireError):
        decode_hidden(save({**example(), **change}, {"version": "1", "head_sha256": SHA}))


@pytest.mark.parametrize(
    "metadata",
    [
        {"version": "1"},
        {"version": "2", "head_sha256": SHA},
        {"version": "1", "head_sha256": SHA[1:]},
        {"version": "1", "head_sha256": "zz" * 32},
        {"version": "1", "head_sha256": SHA, "other": ""},
    ],
)
def test_other_metadata_is_rejected(metadata: dict[str, str]) -> None:
    with pytest.raises(WireError):
        decode_hidden(save(example(), metadata))


def test_hidden_states_of_different_heads_do_not_join() -> None:
    one = HiddenStates(np.array([1]), torch.ones(1, 2), SHA)
    with pytest.raises(WireError, match="one head"):
        HiddenStates.join([one, dataclasses.replace(one, head_sha256="cd" * 32)])
