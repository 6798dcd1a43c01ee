"""Answers that are too large, impossible or of an odd form."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.huggingface.lm_head import LMHeadParams
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.serving.client.client import Protocol, TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.client.retry import RetryPolicy, ServerError
from fused_distill.serving.protocol.hidden_states import HiddenStates, encode_hidden
from fused_distill.serving.protocol.lm_head import save_head
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, encode_binary
from fused_distill.serving.protocol.request import HEAD_PATH
from raw_server import RawServer, Received, endless, http_response
from serving_cases import DESCRIPTION, VOCAB, client_of_responses

HEAD_SHA = "0" * 64
TOO_LONG = r"must have at most .* bytes, got more"
TWICE = RetryPolicy(attempts=2, first_wait_seconds=0.001, longest_wait_seconds=0.001)
# What the kernel's buffers of both sockets may take besides what the client has read.
UNREAD = 16 << 20
CALLS: dict[str, Callable[[TeacherClient], Any]] = {
    "log-probabilities": lambda client: client.get_sequence_logprobs([[1, 2]], [1]),
    "hidden states": lambda client: client.get_hidden_states([[1, 2]], [1]),
}


def client_of(server: RawServer, protocol: Protocol = "fused-distill") -> TeacherClient:
    return TeacherClient(server.url, protocol=protocol, model="m", retries=TWICE)


def assert_not_read_on(server: RawServer) -> None:
    """Check that no endless response was read much further than it should be long."""
    assert server.received
    assert all(request.written < UNREAD for request in server.received)


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_is_read_no_further_than_it_should_be_long(name: str) -> None:
    with RawServer(endless()) as server, client_of(server) as client:
        with pytest.raises(ServerError, match=TOO_LONG):
            CALLS[name](client)
        assert_not_read_on(server)


def test_a_stock_vllm_answer_is_read_no_further_than_it_should_be_long() -> None:
    with RawServer(endless()) as server, client_of(server, "openai") as client:
        with pytest.raises(ServerError, match=TOO_LONG):
            client.get_sequence_logprobs([[1, 2]], [1])
        assert_not_read_on(server)


def test_completions_are_read_no_further_than_they_should_be_long() -> None:
    with (
        RawServer(endless()) as server,
        VllmRollouts(server.url, model="m", retries=TWICE) as rollouts,
        pytest.raises(ServerError, match=TOO_LONG),
    ):
        rollouts.generate([[1]], Sampling(max_tokens=4))


def test_a_description_is_read_no_further_than_it_should_be_long() -> None:
    with (
        RawServer(endless(), describes=False) as server,
        client_of(server) as client,
        pytest.raises(ServerError, match=TOO_LONG),
    ):
        client.info()


def test_an_error_is_read_no_further_than_a_message_needs() -> None:
    with RawServer(endless("400 Bad Request")) as server, client_of(server) as client:
        with pytest.raises(ServerError, match="400 xxx") as caught:
            client.get_sequence_logprobs([[1, 2]], [1])
        assert len(str(caught.value)) < 1000
        assert_not_read_on(server)


def test_an_answer_that_announces_too_much_is_not_read() -> None:
    announcement = http_response(b"", Content_Length=str(800 << 20))
    with (
        RawServer(lambda _: announcement) as server,
        client_of(server) as client,
        pytest.raises(ServerError, match=f"must have at most .* bytes, it announces {800 << 20}"),
    ):
        client.get_sequence_logprobs([[1, 2]], [1])


def test_compression_is_neither_asked_for_nor_accepted() -> None:
    bomb = gzip.compress(bytes(1 << 20))
    with (
        RawServer(lambda _: http_response(bomb, Content_Encoding="gzip")) as server,
        client_of(server) as client,
    ):
        with pytest.raises(ServerError, match="must not be compressed, got Content-Encoding 'gzip'"):
            client.get_sequence_logprobs([[1, 2]], [1])
        assert {request.headers["accept-encoding"] for request in server.received} == {"identity"}


def test_a_compressed_error_is_an_error_by_its_status() -> None:
    refusal = http_response(gzip.compress(b"{}"), "422 Unprocessable", Content_Encoding="gzip")
    with (
        RawServer(lambda _: refusal) as server,
        client_of(server) as client,
        pytest.raises(ServerError, match="422"),
    ):
        client.get_sequence_logprobs([[1, 2]], [1])


@pytest.mark.parametrize("k", [0, 1, VOCAB])
def test_a_full_answer_is_not_too_large(k: int) -> None:
    positions = 2000
    answer = TeacherLogprobs(
        np.array([positions]),
        np.full((positions, k), -20.0, np.float32),
        np.tile(np.arange(k, dtype=np.int32), (positions, 1)),
        np.full(positions, -20.0, np.float32),
        np.full((positions, 3), -20.0, np.float32),
    )
    client, _ = client_of_responses(httpx.Response(200, content=encode_binary(answer)))
    scores = [[[1, 2, 3]] * positions]
    got = client.get_sequence_logprobs([[1] * (positions + 1)], [1], top_logprobs=k, score_ids=scores)
    assert got.logprobs.shape == (positions, k)


def answer_of(top: list[float], ids: list[int], actual: float = -1.0, scores: Any = None) -> httpx.Response:
    """A binary response of one position."""
    answer = TeacherLogprobs(
        np.array([1]),
        np.array([top], np.float32),
        np.array([ids], np.int32),
        np.array([actual], np.float32),
        None if scores is None else np.array([scores], np.float32),
    )
    return httpx.Response(200, content=encode_binary(answer))


IMPOSSIBLE = [
    ("a log-probability above 0", answer_of([1.5, -1.0], [1, 2])),
    ("a log-probability above 0", answer_of([-1.0, -1.0], [1, 2], actual=0.01)),
    ("a log-probability above 0", answer_of([-1.0, -1.0], [1, 2], scores=[0.01])),
    ("probabilities whose sum is above 1", answer_of([-0.1, -0.2], [1, 2])),
    ("a token twice", answer_of([-1.0, -2.0], [3, 3])),
    (f"a token id beyond the vocabulary of {VOCAB} tokens", answer_of([-1.0, -2.0], [3, VOCAB])),
]


@pytest.mark.parametrize(("reason", "response"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_an_impossible_answer_is_refused_with_its_position(reason: str, response: httpx.Response) -> None:
    client, requests = client_of_responses(response)
    scores = [[[1]]] if b"score_logprobs" in response.content else None
    with pytest.raises(TeacherError, match=f"{reason} for sequence 0 at token 1"):
        client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=2, score_ids=scores)
    assert len(requests) == 1


POSSIBLE = [
    answer_of([1e-6, -20.0], [1, 2], actual=1e-6),  # rounded
    answer_of([-0.693, -0.693], [1, 2]),  # a sum of 1.0003
    answer_of([-1.0, -np.inf], [0, 0]),  # an absent entry has the id 0
    answer_of([-1.0, -2.0], [0, VOCAB - 1]),
]


@pytest.mark.parametrize("response", POSSIBLE, ids=range(len(POSSIBLE)))
def test_an_answer_may_be_rounded_and_incomplete(response: httpx.Response) -> None:
    client, _ = client_of_responses(response)
    client.get_sequence_logprobs([[1, 2]], [1], top_logprobs=2)


def test_ids_beyond_a_vocabulary_that_was_asked_for_are_refused() -> None:
    client, _ = client_of_responses(answer_of([-1.0], [9]))
    with pytest.raises(TeacherError, match="beyond the vocabulary of 9 tokens"):
        client.get_sequence_logprobs([[1, 2]], [1], vocab_size=9)


@pytest.mark.parametrize(
    ("states", "dtype"),
    [(torch.zeros(1, 5), "bfloat16"), (torch.zeros(1, 3), "float32"), (torch.zeros(1, 4), "bfloat16")],
)
def test_hidden_states_of_another_size_or_dtype_are_refused(states: torch.Tensor, dtype: Any) -> None:
    payload = encode_hidden(HiddenStates(np.array([1]), states, HEAD_SHA), dtype)
    client, _ = client_of_responses(httpx.Response(200, content=payload))
    with pytest.raises(TeacherError, match="hidden states of size and dtype"):
        client.get_hidden_states([[1, 2]], [1], dtype="float32")


def with_changes(**changes: Any) -> bytes:
    return json.dumps({**DESCRIPTION, **changes}).encode()


ODD_DESCRIPTIONS = [
    b"",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    with_changes(capabilities=None),
    with_changes(capabilities=5),
    with_changes(capabilities={"hidden_states": 1}),
    with_changes(capabilities=[["hidden_states"]]),
    with_changes(limits=None),
    with_changes(limits=[]),
    with_changes(limits={}),
    with_changes(limits={"numbers": 0}),
    with_changes(limits={"numbers": "many"}),
    with_changes(limits={"numbers": True}),
    with_changes(hidden_size=None),
    with_changes(hidden_size=0),
    with_changes(hidden_size=2.0),
    with_changes(vocab_size=-1),
    with_changes(vocab_size=1 << 40),
    with_changes(vocab_size=[50]),
]


@pytest.mark.parametrize("description", ODD_DESCRIPTIONS, ids=range(len(ODD_DESCRIPTIONS)))
@pytest.mark.parametrize("protocol", ["auto", "fused-distill"])
def test_an_odd_description_is_a_server_error(description: bytes, protocol: Protocol, tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=description))
    client = TeacherClient("http://teacher", protocol=protocol, retries=TWICE, transport=transport)
    for call in (
        client.info,
        client.wait_until_ready,
        lambda: client.head(tmp_path),
        lambda: client.get_hidden_states([[1, 2]], [1]),
        lambda: client.get_sequence_logprobs([[1, 2]], [1]),
    ):
        with pytest.raises(ServerError, match=r"no usable answer in 2 rounds"):
            call()


ODD_MODELS = [b"", b"[]", b"{}", b'{"data": []}', b'{"data": [{}]}', b'{"data": [{"id": 5}]}', b"[" * 100_000]


@pytest.mark.parametrize("models", ODD_MODELS, ids=range(len(ODD_MODELS)))
def test_an_odd_list_of_models_is_a_server_error(models: bytes) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=models))
    client = TeacherClient("http://vllm", protocol="openai", retries=TWICE, transport=transport)
    rollouts = VllmRollouts("http://vllm", retries=TWICE, transport=transport)
    for call in (
        client.info,
        lambda: client.get_sequence_logprobs([[1, 2]], [1]),
        lambda: rollouts.generate([[1]], Sampling()),
    ):
        with pytest.raises(ServerError, match=r"no usable answer in 2 rounds"):
            call()


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None, *scalars: Any) -> LMHeadParams:
    scale, softcap = scalars or (1.0, None)
    return LMHeadParams(weight, bias, scale, softcap)


GOOD = torch.ones(VOCAB, 4)
HEADS: list[tuple[str, LMHeadParams]] = [
    ("weight must have a dtype", head_of(GOOD.int())),
    ("weight must have a dtype", head_of(GOOD.double())),
    ("weight must have shape", head_of(torch.ones(VOCAB, 3))),
    ("weight must have shape", head_of(torch.ones(VOCAB - 1, 4))),
    ("weight must have shape", head_of(torch.ones(VOCAB))),
    ("weight must be finite", head_of(GOOD.index_fill(0, torch.tensor(7), torch.nan))),
    ("weight must be finite", head_of(GOOD.index_fill(0, torch.tensor(7), torch.inf))),
    ("bias must have a dtype", head_of(GOOD, torch.ones(VOCAB).int())),
    ("bias must have shape", head_of(GOOD, torch.ones(VOCAB, 1))),
    ("bias must be finite or -inf", head_of(GOOD, torch.full((VOCAB,), torch.nan))),
    ("bias must be finite or -inf", head_of(GOOD, torch.full((VOCAB,), torch.inf))),
    ("logit_scale must be", head_of(GOOD, None, None, None)),
    ("logit_scale must be", head_of(GOOD, None, float("nan"), None)),
    ("logit_scale must be", head_of(GOOD, None, "1", None)),
    ("softcap must be", head_of(GOOD, None, 1.0, [30])),
    ("softcap must be", head_of(GOOD, None, 1.0, 0.0)),
]


def serving_head(content: bytes) -> Callable[[Received], bytes]:
    sha256 = hashlib.sha256(content).hexdigest()

    def handle(request: Received) -> bytes:
        assert request.path == HEAD_PATH
        head = http_response(b"", ETag=f'"{sha256}"', Content_Length=str(len(content)))
        return head if request.method == "HEAD" else http_response(content, ETag=f'"{sha256}"')

    return handle


@pytest.mark.parametrize(("reason", "head"), HEADS, ids=range(len(HEADS)))
def test_an_invalid_head_is_refused_by_name(reason: str, head: LMHeadParams, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head")
    with (
        RawServer(serving_head((tmp_path / "head").read_bytes())) as server,
        client_of(server) as client,
        pytest.raises(TeacherError, match=reason),
    ):
        client.head(tmp_path / "cache")


def test_a_head_with_a_large_weight_and_forbidden_tokens_is_accepted(tmp_path: Path) -> None:
    bias = torch.zeros(VOCAB).index_fill(0, torch.tensor(7), -torch.inf)
    save_head(head_of(GOOD * 3e38, bias), tmp_path / "head")
    with RawServer(serving_head((tmp_path / "head").read_bytes())) as server, client_of(server) as client:
        assert torch.equal(client.head(tmp_path / "cache").weight, GOOD * 3e38)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 100], ids=range(3))
def test_a_file_that_is_no_head_is_refused(content: bytes, tmp_path: Path) -> None:
    with (
        RawServer(serving_head(content)) as server,
        client_of(server) as client,
        pytest.raises(TeacherError, match="LM head is invalid"),
    ):
        client.head(tmp_path)


def test_a_head_is_downloaded_no_further_than_it_should_be_long(tmp_path: Path) -> None:
    def handle(request: Received) -> bytes:
        if request.method == "HEAD":
            return http_response(b"", ETag=f'"{HEAD_SHA}"')
        return endless()(request)

    with RawServer(handle) as server, client_of(server) as client:
        with pytest.raises(ServerError, match=TOO_LONG):
            client.head(tmp_path)
        assert not list(tmp_path.iterdir())
        assert_not_read_on(server)
