"""Half-precision products with a float32 result, which GPUs have, emulated on the CPU with torch's checks.

Each operator makes the checks of torch 2.9 and those of 2.10 and later, so that a call that passes
here passes with every version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fused_distill.chunked import gemm as gemm_module
from fused_distill.chunked import loop
from torch import Tensor


def check(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, got {a.dtype} and {b.dtype}")
    if out.dtype != out_dtype or out_dtype not in (a.dtype, torch.float32):
        raise RuntimeError(
            f"out_dtype must be the dtype of out and of the inputs or float32, got {out_dtype}"
        )


def mm_out(self: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    check(self, mat2, out_dtype, out)
    return out.copy_(self.float() @ mat2.float())


def addmm_out(
    self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: Any, *, beta=1, alpha=1, out: Tensor
) -> Tensor:
    check(mat1, mat2, out_dtype, out)
    if self.dtype != mat2.dtype:  # torch 2.9
        raise RuntimeError("self and mat2 must have the same dtype")
    return out.copy_(beta * self.float() + alpha * (mat1.float() @ mat2.float()))


def baddbmm_out(
    self: Tensor, b1: Tensor, b2: Tensor, out_dtype: Any, *, beta=1, alpha=1, out: Tensor
) -> Tensor:
    check(b1, b2, out_dtype, out)
    if self.dtype not in (out_dtype, b1.dtype):  # 2.10
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    assert self.data_ptr() == out.data_ptr()  # 2.10 copies self to out, older versions ignore self
    return out.copy_(beta * out + alpha * torch.bmm(b1.float(), b2.float()))


@contextmanager
def emulated_fp32_products(**replaced: Callable[..., Tensor]) -> Iterator[None]:
    """Register CUDA's products with out_dtype for the CPU; keywords replace single operators."""
    operators = {"mm": mm_out, "addmm": addmm_out, "baddbmm": baddbmm_out, **replaced}
    with (
        mock.patch.object(gemm_module, "_FP32_OUTPUT", {}),
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        for name, function in operators.items():
            library.impl(f"{name}.dtype_out", function, "CPU")
        yield


@contextmanager
def gpu_rules() -> Iterator[None]:
    """Plan calls on the CPU as on a GPU: chunk sizes, converted heads, half-precision products."""
    gpu = torch.device("cuda")
    with mock.patch.object(loop, "device_of", return_value=gpu), emulated_fp32_products():
        yield
