"""Matrix products by oneDNN for float32 on AMD CPUs and by torch elsewhere, stored in the output's dtype."""

from __future__ import annotations

import platform
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, accumulated and stored in out.dtype."""
    if a.numel() and b.numel() and use_onednn(a.device, a.dtype):
        product = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        (out.add_ if accumulate else out.copy_)(product)
        return
    if a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        # torch 2.8 and 2.9 accumulate half products into float32 in baddbmm, but not in addmm. Later versions
        # first copy the first argument to out, which does nothing if they are the same object.
        batch = out.unsqueeze(0)
        torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=out.dtype, out=batch)
    else:
        torch.mm(a, b, out=out, out_dtype=out.dtype)


def accumulation_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of logits, losses and accumulated gradients: float64 if an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of products under autocast, or None outside autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def float64_if_supported(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it; for tensors of a few numbers per row."""
    return torch.float32 if device.type == "mps" else torch.float64


@lru_cache
def use_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if oneDNN computes the product: float32 on an AMD processor.

    torch.mm uses MKL, which disables its AVX-512 kernels on AMD CPUs. oneDNN is 1.6 to 2 times as fast there
    (AMD EPYC Zen 5, torch 2.13, shapes of `bench/cpu.py`).
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkl.is_available():
        return False
    return torch.backends.mkldnn.is_available() and _cpu_vendor() == "AuthenticAMD" and _onednn_works()


def _cpu_vendor() -> str:
    if platform.system() != "Linux":
        return ""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _onednn_works() -> bool:
    """Return True if this torch has the operator that `gemm` calls and its product is right."""
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""), a @ b)
    except (AttributeError, RuntimeError, TypeError):
        return False


_FP32_OUTPUT: dict[tuple[torch.device, torch.dtype], bool] = {}


def supports_fp32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the device multiplies matrices of this dtype into a float32 result.

    The first call for a device and dtype tries a small product. An error that does not concern support, such
    as out of memory, is raised and not remembered. A graph capture assumes support: it must not wait.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    if (device, dtype) not in _FP32_OUTPUT:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        cause = _why_no_fp32_output(device, dtype)
        _FP32_OUTPUT[device, dtype] = cause is None
        if cause is not None and device.type != "cpu":
            warnings.warn(
                f"fused_distill: {dtype} matrices are multiplied in float32 on {device}, which is several "
                f"times slower: torch {torch.__version__} has no such product into float32 ({cause})",
                RuntimeWarning,
                stacklevel=2,
            )
    return _FP32_OUTPUT[device, dtype]


def _why_no_fp32_output(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if products into float32 work and are right, else the reason."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    result = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        for accumulate, expected in ((False, 16.0), (True, 32.0)):
            gemm(ones, ones, result, accumulate)
            if not bool((result == expected).all()):
                return f"a product of ones gave {result.flatten()[0].item()}, expected {expected}"
    except (NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not supported", "not implemented", "same dtype")):
            raise
        return str(error).splitlines()[0]
    return None
