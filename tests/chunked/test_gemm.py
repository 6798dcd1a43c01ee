"""Half-precision products with a float32 result, which GPUs have, emulated on the CPU with torch's checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import INTERPRETED, Case
from fused_distill.chunked import gemm as gemm_module
from fused_distill.chunked.gemm import gemm, supports_fp32_output
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

CPU = torch.device("cpu")
Emulate = Callable[..., None]


def mm_out(self: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(self.float() @ mat2.float())


def addmm_out(
    self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: Any, *, beta=1, alpha=1, out: Tensor
) -> Tensor:
    if self.dtype != mat2.dtype:  # torch 2.8 and 2.9
        raise RuntimeError("self and mat2 must have the same dtype")
    return out.copy_(beta * self.float() + alpha * (mat1.float() @ mat2.float()))


def baddbmm_out(
    self: Tensor, b1: Tensor, b2: Tensor, out_dtype: Any, *, beta=1, alpha=1, out: Tensor
) -> Tensor:
    assert self.data_ptr() == out.data_ptr()  # 2.10 copies self to out, older versions ignore self
    return out.copy_(beta * out + alpha * torch.bmm(b1.float(), b2.float()))


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulate]:
    """Register CUDA's products with out_dtype for the CPU; keywords replace single operators."""
    monkeypatch.setattr(gemm_module, "_FP32_OUTPUT", {})
    with torch.library._scoped_library("aten", "IMPL") as library:

        def register(**replaced: Callable[..., Tensor]) -> None:
            operators = {"mm": mm_out, "addmm": addmm_out, "baddbmm": baddbmm_out, **replaced}
            for name, function in operators.items():
                library.impl(f"{name}.dtype_out", function, "CPU")

        yield register


def failing(error: Exception) -> Callable[..., Tensor]:
    def operator(*args: Any, **options: Any) -> Tensor:
        raise error

    return operator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_accumulate_in_float32_by_the_rules_of_torch_2_8(
    emulate: Emulate, dtype: torch.dtype
) -> None:
    emulate()
    a, b, out = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype), torch.randn(5, 3)
    expected = out.double() + a.double() @ b.double()
    gemm(a, b, out, accumulate=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    assert supports_fp32_output(CPU, dtype)


def test_bfloat16_gradients_are_within_three_roundings_on_the_gpu_path(emulate: Emulate) -> None:
    emulate()
    sizes = ((40, 16), (500, 16), (40, 24), (500, 24))
    generator = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    case = Case((hs, ws, ht, wt), {}, {"beta": 0.5})
    case = case.with_options(workspace_bytes=8 * case.min_workspace())
    result, oracle = case.run("torch"), case.oracle()
    torch.testing.assert_close(result.loss.double(), oracle.loss, rtol=1e-5, atol=0)
    for grad, true in zip(result.grads, oracle.grads, strict=True):
        assert grad is not None
        assert true is not None
        one_rounding = (true.bfloat16().double() - true).norm()
        assert (grad.double() - true).norm() <= 3 * one_rounding


def test_a_wrong_product_is_not_used(emulate: Emulate) -> None:
    emulate(mm=lambda self, mat2, out_dtype, *, out: out.zero_())
    assert not supports_fp32_output(CPU, torch.bfloat16)


@pytest.mark.parametrize("message", ["not supported for ROCm", "self and mat2 must have the same dtype"])
def test_an_unsupported_product_is_not_used_and_not_tried_again(emulate: Emulate, message: str) -> None:
    emulate(baddbmm=failing(RuntimeError(message)))
    assert not supports_fp32_output(CPU, torch.bfloat16)
    assert {(CPU, torch.bfloat16): False} == gemm_module._FP32_OUTPUT


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_an_error_that_says_nothing_about_support_is_raised_and_not_remembered(
    emulate: Emulate, error: Exception
) -> None:
    emulate(mm=failing(error))
    with pytest.raises(type(error)):
        supports_fp32_output(CPU, torch.bfloat16)
    assert gemm_module._FP32_OUTPUT == {}


def test_float32_products_of_half_inputs_on_a_gpu_are_warned_about_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm_module, "_FP32_OUTPUT", {})
    monkeypatch.setattr(gemm_module, "_why_no_fp32_output", lambda device, dtype: "no such operator")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="multiplied in float32 on cuda:0.*no such operator"):
        assert not supports_fp32_output(torch.device("cuda:0"), torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not supports_fp32_output(torch.device("cuda:0"), torch.bfloat16)
