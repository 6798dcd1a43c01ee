"""`topk_logprobs` with the log-sum-exp kernel, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, DEVICE
from fused_distill import topk_logprobs
from torch import Tensor

pytestmark = pytest.mark.skipif(BACKEND != "triton", reason="runs the kernel")

VOCAB = 5000  # several tiles of the kernel

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "logit_scale": 0.3},
    {"logit_scale": 0.3, "softcap": 5.0, "temperature": 2.0},
    {"bias": torch.linspace(-3, 3, VOCAB).to(DEVICE)},
    {"vocab_size": 2049},
]


@pytest.fixture(autouse=True)
def kernel_is_used() -> Iterator[None]:
    """Select the kernel on the CPU too, and require that it runs."""
    module = importlib.import_module("fused_distill.topk_logprobs")
    spy = mock.patch.object(module, "_logprobs_by_kernel", wraps=module._logprobs_by_kernel)
    with mock.patch.object(module, "auto_backend", return_value=("triton", "")), spy as used:
        yield
    assert used.called


def exact_logprobs(hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    logits = hidden.double() @ weight.double().T + options.get("bias", torch.zeros(VOCAB).to(DEVICE)).double()
    logits = logits[..., : options.get("vocab_size", VOCAB)] * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return torch.log_softmax(logits / options.get("temperature", 1.0), -1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("k", [0, 5])
def test_logprobs_equal_log_softmax(options: dict[str, Any], k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(DEVICE) for n in (6, VOCAB))
    actual = torch.randint(2049, (6, 3), generator=generator).to(DEVICE)
    result = topk_logprobs(hidden, weight, k, actual, **options)
    exact = exact_logprobs(hidden, weight, options)
    torch.testing.assert_close(result.logprobs.double(), exact.topk(k).values, rtol=1e-6, atol=1e-6)
    assert result.actual_logprobs is not None
    torch.testing.assert_close(
        result.actual_logprobs.double(), exact.gather(-1, actual), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("others", [1e-3, 1e-6, 1e-9])
def test_logprob_of_a_nearly_certain_token_keeps_its_digits(others: float) -> None:
    logits = torch.full((1, VOCAB), float(torch.tensor(others / VOCAB).log())).to(DEVICE)
    logits[0, 4321] = 0.0
    result = topk_logprobs(logits, torch.eye(VOCAB).to(DEVICE), 1)
    assert result.ids.item() == 4321
    expected = -(logits[0].double().exp().sum() - 1).log1p()
    assert result.logprobs.item() == pytest.approx(expected.item(), rel=1e-6)


def test_nan_reaches_the_logprobs() -> None:
    hidden = torch.ones(2, 8).to(DEVICE)
    hidden[0, 0] = torch.nan
    result = topk_logprobs(hidden, torch.ones(VOCAB, 8).to(DEVICE), 2)
    assert result.logprobs[0].isnan().all()
    assert result.logprobs[1].isfinite().all()
