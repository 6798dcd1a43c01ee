"""Backend selection."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from ..config import Backend, LossConfig, TopKLossConfig
from ..tracing import without_data
from .base import RowLoss
from .cpp.library import why_unavailable
from .full_cpp import CppJSD
from .full_torch import TorchJSD
from .tail_cpp import CppTail
from .tail_torch import TorchTail
from .topk import SupportRowLoss, TailRowLoss

Chosen = Literal["triton", "cpp", "torch"]


def auto_backend(device: torch.device, dtype: torch.dtype) -> tuple[Chosen, str]:
    """Return the backend that "auto" selects for a device and accumulation dtype, and the reason."""
    if without_data():
        return "torch", "PyTorch's operations are recorded or simulated"
    if device.type == "cpu":
        missing = why_unavailable()
        return ("cpp", "a CPU with a C++ compiler") if missing is None else ("torch", missing)
    if device.type != "cuda":
        return "torch", "there are kernels for the CPU and for CUDA and ROCm devices alone"
    if dtype != torch.float32:
        return "torch", "the Triton kernels compute in float32"
    if find_spec("triton") is None:
        return "torch", "Triton is not installed"
    missing = _missing_for_triton()
    if missing is not None:
        return "torch", f"Triton compiles its launchers when they are first used, and {missing}"
    return "triton", "a CUDA or ROCm device, float32 logits, and Triton is installed"


@cache
def _missing_for_triton() -> str | None:
    """Return what Triton's launchers lack at run time, or None."""
    if os.name != "posix":
        return None
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "no C compiler was found: install gcc or clang, or set CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"{header} does not exist: install Python's development headers"


@cache
def _warn_of_slow_backend(device_type: str, reason: str) -> None:
    warnings.warn(
        f"fused_distill: the loss on {device_type} uses the PyTorch backend, which is several times slower "
        f"than the kernels: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def choose_backend(name: Backend, device: torch.device, dtype: torch.dtype) -> Chosen:
    """Return "triton", "cpp" or "torch" for a backend option, a device and an accumulation dtype.

    Raises:
        ImportError: "triton" without Triton installed.
        RuntimeError: "cpp" where its library cannot be built.
        ValueError: a backend on a device or with a dtype that it does not support, or a backend that PyTorch
            cannot record while it records or simulates operations.
    """
    if name == "auto":
        backend, reason = auto_backend(device, dtype)
        has_kernels = device.type == "cpu" or (device.type == "cuda" and dtype == torch.float32)
        if backend == "torch" and has_kernels and not without_data():
            _warn_of_slow_backend(device.type, reason)
        return backend
    if name == "torch":
        return name
    if without_data():
        raise ValueError(f"backend={name!r} cannot be recorded or simulated by PyTorch; use backend='torch'")
    if name == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend='cpp' needs tensors on a CPU, got student_hidden on {device}")
        missing = why_unavailable()
        if missing is not None:
            raise RuntimeError(f"backend='cpp' cannot be built: {missing}")
        return name
    if find_spec("triton") is None:
        raise ImportError("backend='triton' needs Triton: pip install 'fused-distill[triton]'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or ROCm device, got student_hidden on {device}"
        )
    if dtype != torch.float32:
        raise ValueError("backend='triton' computes in float32; use backend='torch' for float64 inputs")
    return "triton"


def make_row_loss(name: Chosen, config: LossConfig, k: int | None, device_type: str) -> RowLoss:
    """Return the row loss of a call.

    Args:
        name: from `choose_backend`.
        config: the loss's options.
        k: size of a top-k teacher's support; None for a full-vocabulary teacher.
        device_type: of the device that computes the loss.
    """
    if k is None or not isinstance(config, TopKLossConfig):
        if name == "triton":
            from .full_triton import TritonJSD

            return TritonJSD()
        return CppJSD() if name == "cpp" else TorchJSD(device_type)
    if name == "triton":
        from .topk_triton import TritonSupportRowLoss, TritonTailRowLoss

        return TritonSupportRowLoss(k) if config.projects_support_only else TritonTailRowLoss(k)
    outcomes, passes = (
        (CppJSD(), CppTail()) if name == "cpp" else (TorchJSD(device_type), TorchTail(device_type))
    )
    return SupportRowLoss(k, outcomes) if config.projects_support_only else TailRowLoss(k, outcomes, passes)
