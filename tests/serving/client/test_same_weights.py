"""A client refuses answers of our server that come from other weights."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.protocol.request import WEIGHTS_HEADER
from fused_distill.serving.server.transformers_engine import TransformersEngine
from serving_cases import DESCRIPTION, FAST_RETRIES, FakeEngine, one_position, post, serving


def client_of(*fingerprints: str | None) -> TeacherClient:
    """Return a client whose server's answers have these fingerprints, one after the other."""
    remaining = iter(fingerprints)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/teacher":
            return httpx.Response(200, json=DESCRIPTION)
        fingerprint, answer = next(remaining), one_position()
        headers = {} if fingerprint is None else {WEIGHTS_HEADER: fingerprint}
        return httpx.Response(200, headers=headers, content=answer.content)

    transport = httpx.MockTransport(handle)
    return TeacherClient(
        "http://user:secret@teacher:81", protocol="fused-distill", retries=FAST_RETRIES, transport=transport
    )


def ask(client: TeacherClient) -> Any:
    return client.get_sequence_logprobs([[1, 2]], [1])


def test_the_server_and_both_fingerprints_are_named() -> None:
    client = client_of("aa", "aa", "bb")
    ask(client)
    ask(client)
    with pytest.raises(TeacherError) as error:
        ask(client)
    assert "http://teacher:81 answers with other weights" in str(error.value)
    assert "is bb, that of http://teacher:81 was aa" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_server_that_does_not_tell_its_weights_is_refused_only_after_one_that_did() -> None:
    client = client_of(None, "aa", None)
    ask(client)
    ask(client)
    with pytest.raises(TeacherError, match="fingerprint is None"):
        ask(client)


def test_every_form_of_answer_carries_the_fingerprint(url: str, model: Any) -> None:
    fingerprint = httpx.get(f"{url}/v1/teacher").json()["weights_fingerprint"]
    assert fingerprint == TransformersEngine(model).info.weights_fingerprint
    body: dict[str, Any] = {"sequences": [[1, 2, 3]], "prompt_lengths": [1]}
    for options in (
        {"response_format": "binary"},
        {"response_format": "base64"},
        {"response_format": "json"},
        {"response_format": "binary", "response": "hidden_states"},
        {"prompt_lengths": [9]},  # refused
    ):
        assert post(url, **body | options).headers[WEIGHTS_HEADER] == fingerprint
    with serving(FakeEngine()) as served:
        assert WEIGHTS_HEADER not in post(served.url, **body).headers


@pytest.mark.parametrize("what", ["log-probabilities", "scores", "hidden states"])
def test_a_server_restarted_with_other_weights_is_noticed(model: Any, what: str) -> None:
    import copy

    import torch
    from serving_cases import Served, create_app

    other = copy.deepcopy(model)
    with torch.no_grad():  # the LM head is tied to the embeddings and stays
        other.model.layers[0].mlp.up_proj.weight.add_(0.01)

    def call(client: TeacherClient) -> Any:
        if what == "hidden states":
            return client.get_hidden_states([[1, 2, 3]], [1])
        return client.get_sequence_logprobs(
            [[1, 2, 3]], [1], score_ids=[[[1], [2]]] if what == "scores" else None
        )

    served = Served(create_app(TransformersEngine(model)))
    with TeacherClient(served.url, retries=FAST_RETRIES) as client:
        call(client)
        call(client)
        served.stop()
        served = Served(create_app(TransformersEngine(other)), port=served.port)
        with pytest.raises(TeacherError, match=f"{served.url} answers with other weights"):
            call(client)
    served.stop()
