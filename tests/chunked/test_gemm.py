"""Half-precision products with a float32 result: the choice of the product, and its errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from emulated_gpu import emulated_fp32_products
from fused_distill.chunked import gemm as gemm_module
from fused_distill.chunked.gemm import Fp32Output, gemm, supports_fp32_output
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
Emulate = Callable[..., None]


@pytest.fixture
def emulate() -> Iterator[Emulate]:
    """Emulate CUDA's products on the CPU until the end of the test."""
    with ExitStack() as stack:
        yield lambda **replaced: stack.enter_context(emulated_fp32_products(**replaced))


@pytest.fixture
def gpu_without_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Return a function that pretends a GPU on which only Triton multiplies, or fails for a cause."""

    def pretend(triton_cause: str | None) -> None:
        def why_not(multiply: Any, device: torch.device, dtype: torch.dtype) -> str | None:
            return triton_cause if multiply is gemm_module._triton_matmul else "no such operator"

        monkeypatch.setattr(gemm_module, "_FP32_OUTPUT", {})
        monkeypatch.setattr(gemm_module, "_why_not", why_not)
        monkeypatch.setattr(gemm_module, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    return pretend


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


def test_a_wrong_product_is_not_used(emulate: Emulate) -> None:
    emulate(mm=lambda self, mat2, out_dtype, *, out: out.zero_())
    assert not supports_fp32_output(CPU, torch.bfloat16)


@pytest.mark.parametrize("message", ["not supported for ROCm", "self and mat2 must have the same dtype"])
def test_an_unsupported_product_is_not_used_and_not_tried_again(emulate: Emulate, message: str) -> None:
    emulate(baddbmm=failing(RuntimeError(message)))
    assert not supports_fp32_output(CPU, torch.bfloat16)
    assert {(CPU, torch.bfloat16): Fp32Output.NONE} == gemm_module._FP32_OUTPUT


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
    gpu_without_products: Callable[[str | None], None],
) -> None:
    gpu_without_products("no compiler")
    with pytest.warns(RuntimeWarning, match="multiplied in float32 on cuda:0.*no such operator.*no compiler"):
        assert not supports_fp32_output(GPU, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not supports_fp32_output(GPU, torch.bfloat16)


def test_a_gpu_without_such_products_uses_the_triton_kernel(
    gpu_without_products: Callable[[str | None], None],
) -> None:
    gpu_without_products(None)
    assert supports_fp32_output(GPU, torch.bfloat16)
    assert {(GPU, torch.bfloat16): Fp32Output.TRITON} == gemm_module._FP32_OUTPUT


def test_products_of_a_gpu_that_is_not_present_are_assumed_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm_module, "_FP32_OUTPUT", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert supports_fp32_output(GPU, torch.bfloat16)
    assert gemm_module._FP32_OUTPUT == {}
