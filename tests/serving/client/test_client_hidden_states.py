"""Hidden states and the cached LM head of the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fused_distill.huggingface.lm_head import lm_head_of
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.client.retry import ServerError
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.serving.server.validation import ServerLimits
from serving_cases import (
    FakeEngine,
    random_sequences,
    serving,
)


class Counting(httpx.HTTPTransport):
    def __init__(self) -> None:
        super().__init__()
        self.downloads = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.downloads += request.method == "GET" and request.url.path == "/v1/teacher/head"
        return super().handle_request(request)


def test_the_head_is_downloaded_once(url: str, tmp_path: Path) -> None:
    transport = Counting()
    for _ in range(3):
        with TeacherClient(url, transport=transport) as client:
            client.head(tmp_path)
    assert transport.downloads == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_cached_head_is_downloaded_again(url: str, model: Any, tmp_path: Path) -> None:
    with TeacherClient(url) as client:
        client.head(tmp_path)
        (kept,) = tmp_path.iterdir()
        kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")
        assert torch.equal(client.head(tmp_path).weight, lm_head_of(model).weight)


def test_a_head_that_arrives_damaged_is_downloaded_again_and_not_cached(url: str, tmp_path: Path) -> None:
    class Damaging(Counting):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            if self.downloads == 1 and request.method == "GET":
                return httpx.Response(200, content=b"half of it")
            return response

    transport = Damaging()
    with TeacherClient(url, protocol="fused-distill", transport=transport) as client:
        client.head(tmp_path)
    assert transport.downloads == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_hidden_states_of_another_head_are_refused(url: str, model: Any, tmp_path: Path) -> None:
    other = TransformersEngine(model)
    assert other.head_file is not None
    other.head_file.head = other.head_file.head._replace(weight=other.head_file.head.weight + 1)
    with serving(other) as changed, TeacherClient([url, changed.url]) as client:
        client.head(tmp_path)
        client._http._preferred = 1
        with pytest.raises(TeacherError, match="another head"):
            client.get_hidden_states([[1, 2, 3]], [1])


def test_an_engine_without_hidden_states_says_so(tmp_path: Path) -> None:
    with serving(FakeEngine()) as served, TeacherClient(served.url) as client:
        with pytest.raises(ServerError, match="no hidden_states"):
            client.get_hidden_states([[1, 2]], [1])
        with pytest.raises(ServerError, match="no hidden_states"):
            client.head(tmp_path)
        assert httpx.get(f"{served.url}/v1/teacher/head").status_code == 404


def test_hidden_states_false_disables_hidden_states_and_head(model: Any, tmp_path: Path) -> None:
    engine = TransformersEngine(model, hidden_states=False)
    with serving(engine) as served, TeacherClient(served.url) as client:
        assert client.info()["capabilities"] == ["temperature", "score_ids", "vocab_size"]
        with pytest.raises(ServerError, match="no hidden_states"):
            client.head(tmp_path)


def test_a_call_is_divided_so_that_responses_stay_within_the_servers_limit(model: Any) -> None:
    sequences, prompts = random_sequences(6, seed=2)
    with serving(TransformersEngine(model), limits=ServerLimits(numbers=20 * 16)) as served:
        with TeacherClient(served.url) as client:
            answer = client.get_hidden_states(sequences, prompts)
        assert len(answer.lengths) == 6


def test_a_server_saves_its_head_again_if_the_file_was_removed(model: Any, tmp_path: Path) -> None:
    engine = TransformersEngine(model)
    assert engine.head_file is not None
    with serving(engine) as served, TeacherClient(served.url) as client:
        client.head(tmp_path / "first")
        engine.head_file.saved().path.unlink()
        client.head(tmp_path / "second")
