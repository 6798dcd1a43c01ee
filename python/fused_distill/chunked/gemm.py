"""Matrix products, by the library that is fastest where they run."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, never rounded to a's dtype on the way."""
    if a.numel() and b.numel() and onednn_multiplies(a.device, a.dtype):
        product = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        (out.add_ if accumulate else out.copy_)(product)
        return
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        torch.mm(a, b, out=out, **options)


def accumulation_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype of logits, losses and accumulated gradients: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast, None outside it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@lru_cache
def onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are left to oneDNN: float32 on an AMD processor.

    torch.mm uses MKL there, which keeps AVX-512 to Intel's processors: oneDNN is 1.6 to 2 times as fast (AMD
    EPYC Zen 5, torch 2.13, shapes of `bench/cpu.py`).
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
    """Whether torch has the operator that `multiply` calls, and it computes products."""
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""), a @ b)
    except (AttributeError, RuntimeError, TypeError):
        return False


@lru_cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this dtype into a float32 result."""
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    probe = torch.ones(16, 16, dtype=dtype, device=device)
    result = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        multiply(probe, probe, result)
        multiply(probe, probe, result, accumulate=True)
    except (RuntimeError, TypeError):
        return False
    return True
