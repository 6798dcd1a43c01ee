"""The Triton product with float32 output, in the interpreter, whose bfloat16 products are wrong."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cases import INTERPRETED, Case
from fused_distill.chunked import gemm as gemm_module
from fused_distill.chunked.gemm import Fp32Output

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fused_distill_kernels.matmul import matmul


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (130, 70, 129), (3, 200, 5), (1100, 3, 130), (5, 0, 4), (0, 3, 4)]
)
def test_product_equals_float64(shape: tuple[int, int, int], transposed: bool, accumulate: bool) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k).half(), torch.randn(k, n).half()
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    padded = torch.randn(m, n + 3)
    out, before = padded[:, :n], padded.clone()
    expected = a.double() @ b.double() + (before[:, :n].double() if accumulate else 0)
    matmul(a, b, out, accumulate)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded[:, n:], before[:, n:])


def test_a_loss_by_this_product_equals_the_reference() -> None:
    sizes = ((5, 16), (300, 16), (5, 24), (300, 24))
    hs, ws, ht, wt = (torch.randn(size).half() for size in sizes)
    case = Case((hs, ws, ht, wt), {}, {"beta": 0.5})
    products = {(torch.device("cpu"), torch.float16): Fp32Output.TRITON}
    with mock.patch.object(gemm_module, "_FP32_OUTPUT", products):
        result = case.run()
    oracle = case.oracle()
    torch.testing.assert_close(result.loss.double(), oracle.loss, rtol=1e-5, atol=0)
    for actual, exact in zip(result.grads, oracle.grads, strict=True):
        assert actual is not None
        assert exact is not None
        assert (actual.double() - exact).norm() <= 3 * (exact.half().double() - exact).norm()
