"""The OpenAPI description against the server: generated requests, good and bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fused_distill.serving.server.transformers_engine import TransformersEngine
from hypothesis import given, settings
from serving_cases import serving

schemathesis = pytest.importorskip("schemathesis")
TOKEN = "secret"


@pytest.fixture(scope="module")
def secured_url(model: Any) -> Iterator[str]:
    with serving(TransformersEngine(model), token=TOKEN) as served:
        yield served.url


@pytest.fixture(scope="module")
def description(secured_url: str) -> Any:
    return schemathesis.openapi.from_url(
        f"{secured_url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}
    )


ENDPOINTS = {
    "/health": "GET",
    "/metrics": "GET",
    "/v1/teacher": "GET",
    "/v1/teacher/head": "GET",
    "/get_sequence_logprobs/": "POST",
}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_response_is_as_described(description: Any, path: str, mode: Any) -> None:
    operation = description[path][ENDPOINTS[path]]
    if mode.is_negative and path != "/get_sequence_logprobs/":
        pytest.skip("nothing but a body can be wrong")

    @settings(max_examples=50)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # A body may fit the schema and still be refused: its lists must also fit each other and the teacher.
        excluded = [schemathesis.checks.positive_data_acceptance]
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=excluded)

    check()


def test_every_endpoint_but_health_is_described_as_secured(secured_url: str) -> None:
    paths = httpx.get(f"{secured_url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()[
        "paths"
    ]
    secured = {path: "security" in operation for path in paths for operation in paths[path].values()}
    assert secured == {path: path != "/health" for path in ENDPOINTS}
