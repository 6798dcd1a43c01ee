"""Matrix products by the faster library of the device, stored in the output's dtype."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec

import torch
from torch import Tensor

from .cpu_product import cpu_product, onednn_mm


def gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, accumulated and stored in out.dtype."""
    if a.numel() and b.numel() and use_onednn(a.device, a.dtype):
        (out.add_ if accumulate else out.copy_)(onednn_mm(a, b))
        return
    if a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif _FP32_OUTPUT.get((a.device, a.dtype)) is Fp32Output.TRITON:
        _triton_matmul(a, b, out, accumulate)
    else:
        _vendor_matmul(a, b, out, accumulate)


def _vendor_matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Multiply half-precision matrices into a float32 result by torch."""
    if not accumulate:
        torch.mm(a, b, out=out, out_dtype=out.dtype)
        return
    # torch 2.9 accumulates half products into float32 in baddbmm, but not in addmm. Later versions first
    # copy the first argument to out, which does nothing if they are the same object.
    batch = out.unsqueeze(0)
    torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=out.dtype, out=batch)


def _triton_matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Multiply half-precision matrices into a float32 result by this package's kernel."""
    from fused_distill_kernels.matmul import matmul

    matmul(a, b, out, accumulate)


def accumulation_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of logits, losses and accumulated gradients: float64 if an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of products under autocast, or None outside autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def float64_if_supported(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it; for tensors of a few numbers per row."""
    return torch.float32 if device.type == "mps" else torch.float64


def use_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if oneDNN computes the products: float32 on a CPU where it is faster, see `cpu_product`."""
    return device.type == "cpu" and dtype == torch.float32 and cpu_product().library == "onednn"


class Fp32Output(Enum):
    """The library that multiplies half-precision matrices into a float32 result on a device."""

    VENDOR = "the vendor's library"
    TRITON = "a Triton kernel"
    NONE = "nothing"


_FP32_OUTPUT: dict[tuple[torch.device, torch.dtype], Fp32Output] = {}


def supports_fp32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the device multiplies matrices of this dtype into a float32 result.

    The first call for a device and dtype tries a small product. An error that does not concern support, such
    as out of memory, is raised and not remembered. A graph capture, which must not wait, and a plan for a GPU
    that is not present assume support.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    if (device, dtype) not in _FP32_OUTPUT:
        if device.type == "cuda" and not torch.cuda.is_available():
            return True
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        _FP32_OUTPUT[device, dtype] = _find_fp32_output(device, dtype)
    return _FP32_OUTPUT[device, dtype] is not Fp32Output.NONE


def _find_fp32_output(device: torch.device, dtype: torch.dtype) -> Fp32Output:
    """Return the first way to a float32 result that works; warn if a GPU has none."""
    vendor_cause = _why_not(_vendor_matmul, device, dtype)
    if vendor_cause is None:
        return Fp32Output.VENDOR
    if device.type == "cpu":
        return Fp32Output.NONE
    triton_cause = "the Triton kernel needs a CUDA or ROCm device and Triton"
    if device.type == "cuda" and find_spec("triton") is not None:
        try:
            triton_cause = _why_not(_triton_matmul, device, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many types, where Triton cannot compile
            triton_cause = _first_line(error)
        if triton_cause is None:
            return Fp32Output.TRITON
    warnings.warn(
        f"fused_distill: {dtype} matrices are multiplied in float32 on {device}, which is several times "
        f"slower: torch {torch.__version__} has no such product into float32 ({vendor_cause}), "
        f"nor is there another ({triton_cause})",
        RuntimeWarning,
        stacklevel=3,
    )
    return Fp32Output.NONE


def _why_not(
    multiply: Callable[[Tensor, Tensor, Tensor, bool], None], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return None if products into float32 work and are right, else the reason."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    result = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        for accumulate, expected in ((False, 16.0), (True, 32.0)):
            multiply(ones, ones, result, accumulate)
            if not bool((result == expected).all()):
                return f"a product of ones gave {result.flatten()[0].item()}, expected {expected}"
    except (NotImplementedError, TypeError) as error:
        return _first_line(error)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not supported", "not implemented", "same dtype")):
            raise
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
