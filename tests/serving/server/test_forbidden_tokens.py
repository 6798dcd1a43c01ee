"""Tokens that a teacher forbids: log-probability -inf in every form of a response, null in JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.serving.protocol.logprobs import TeacherLogprobs, decode_binary
from fused_distill.serving.protocol.request import ScoringOptions, TokenSequence
from fused_distill.serving.server.batching import MAX_FAILURES
from fused_distill.serving.server.transformers_engine import TransformersEngine
from serving_cases import VALID_BODY, VOCAB, FakeEngine, assert_same_response, from_json, post, serving

transformers = pytest.importorskip("transformers")
FIRST_FORBIDDEN = 40


@pytest.fixture(scope="module")
def forbidding_model() -> Any:
    """A Phi whose LM head has a bias of -inf for the last ids."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=VOCAB, **sizes))
    with torch.no_grad():
        model.lm_head.bias[FIRST_FORBIDDEN:] = -torch.inf
    return model.eval()


@pytest.fixture(scope="module")
def forbidding(forbidding_model: Any) -> Iterator[str]:
    with serving(TransformersEngine(forbidding_model)) as served:
        yield served.url


def test_forbidden_tokens_are_minus_infinity_in_every_form(forbidding: str) -> None:
    body: dict[str, Any] = {
        "sequences": [[1, 2, FIRST_FORBIDDEN]],
        "prompt_lengths": [1],
        "top_logprobs": FIRST_FORBIDDEN + 1,
        "score_ids": [[[3, FIRST_FORBIDDEN]] * 2],
    }
    content = post(forbidding, **body).json()
    assert content["actual_logprobs"][0][1] is None
    answer = from_json(content)
    assert answer.actual_logprobs[0] > -np.inf == answer.actual_logprobs[1]
    assert answer.score_logprobs is not None
    assert (answer.score_logprobs == -np.inf).tolist() == [[False, True]] * 2
    assert (answer.logprobs == -np.inf).sum(-1).tolist() == [1, 1]
    np.testing.assert_allclose(np.exp(answer.logprobs).sum(-1), 1, rtol=1e-5)
    assert_same_response(decode_binary(post(forbidding, **body, response_format="binary").content), answer)
    wrapped = post(forbidding, **body, response_format="base64").json()
    assert_same_response(decode_binary(base64.b64decode(wrapped["binary"])), answer)


class ConstantEngine(FakeEngine):
    """Every log-probability is one number."""

    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> list[TeacherLogprobs]:
        answers = super().score(batch, options)
        for answer in answers:
            answer.actual_logprobs[:] = self.number
        return answers


@pytest.mark.parametrize("number", [np.inf, np.nan])
@pytest.mark.parametrize("form", ["json", "binary", "base64"])
def test_a_number_that_is_no_logprob_is_a_500_that_says_so(number: float, form: str) -> None:
    with serving(ConstantEngine(number)) as served:
        response = post(served.url, sequences=[[1, 2]], prompt_lengths=[1], response_format=form)
    assert response.status_code == 500
    assert "the engine gave NaN or infinity for sequence 0" in response.json()["detail"]


def test_health_reports_an_engine_that_gives_no_valid_answers() -> None:
    with serving(ConstantEngine(np.nan)) as served:
        for _ in range(MAX_FAILURES):
            assert httpx.get(f"{served.url}/health").status_code == 200
            assert post(served.url, **VALID_BODY).status_code == 500
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_a_model_that_gives_nan_is_not_served(forbidding_model: Any) -> None:
    forbidding_model.model.embed_tokens.weight.data[1] = torch.nan
    with pytest.raises(ValueError, match="gives NaN"):
        TransformersEngine(forbidding_model)
