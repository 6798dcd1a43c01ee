"""The gather-dot kernels of tail="renormalize" against products with gathered rows."""

from __future__ import annotations

import pytest
import torch
from cases import BACKEND, DEVICE
from fused_distill.chunked.lm_head import IndexedLMHead
from torch import Tensor

pytestmark = pytest.mark.skipif(BACKEND != "triton", reason="runs the kernels")

# More tokens than a program reads at once, so that a column occurs more often; more elements than its width.
TOKENS, K, VOCAB, WIDTH = 40, 5, 7, 700


def heads(dtype: torch.dtype) -> tuple[IndexedLMHead, IndexedLMHead, Tensor, Tensor]:
    """Return the head by kernels and a float64 one without kernels, hidden states, and a logit gradient."""
    from fused_distill.chunked.indexed_triton import TritonIndexedLMHead

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(DEVICE, dtype)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(DEVICE)
    grad = torch.randn(TOKENS, K, generator=generator).to(DEVICE)
    ids = torch.rand(TOKENS, VOCAB, generator=generator).argsort(-1)[:, :K].to(DEVICE)
    absent = torch.rand(TOKENS, K, generator=generator).to(DEVICE) < 0.2
    grad[absent] = 0.0
    by_kernel = TritonIndexedLMHead(weight, torch.float32, "cpu", ids.masked_fill(absent, -1))
    return by_kernel, IndexedLMHead(weight.double(), torch.float64, "cpu", ids, TOKENS), hidden, grad


def assert_close(actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_gradients_equal_those_of_gathered_rows(dtype: torch.dtype) -> None:
    by_kernel, exact, hidden, grad = heads(dtype)
    logits = by_kernel.project(hidden, torch.empty_like(grad))
    present = by_kernel.ids >= 0
    expected = exact.project(hidden.double(), torch.empty_like(grad, dtype=torch.float64))
    assert_close(logits, torch.where(present, expected, 0.0))

    assert_close(
        by_kernel.back_project(grad, torch.empty_like(hidden)),
        exact.back_project(grad.double(), torch.empty_like(hidden, dtype=torch.float64)),
    )

    before = torch.randn(VOCAB, WIDTH).to(DEVICE)
    weight_grad, exact_weight_grad = before.clone(), before.double()
    by_kernel.add_weight_gradient(grad, hidden, weight_grad, overwrite=False)
    exact.add_weight_gradient(grad.double(), hidden.double(), exact_weight_grad, overwrite=False)
    assert_close(weight_grad, exact_weight_grad)

    bias_grad, exact_bias_grad = before[:, 0].clone(), before[:, 0].double()
    by_kernel.add_bias_gradient(grad, bias_grad)
    exact.add_bias_gradient(grad.double(), exact_bias_grad)
    assert_close(bias_grad, exact_bias_grad)
