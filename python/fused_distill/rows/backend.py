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
from .base import RowLoss
from .compiled import Compiler, StageRunner
from .full_torch import TorchJSD
from .tail_torch import TorchTail
from .topk import SupportRowLoss, TailRowLoss

# Below this many logits per call, compiling the row arithmetic costs more than it saves.
_COMPILE_MIN_LOGITS = 1 << 24


def auto_backend(device: torch.device, dtype: torch.dtype) -> tuple[Literal["triton", "torch"], str]:
    """Return the backend that "auto" selects for a device and accumulation dtype, and the reason."""
    if device.type != "cuda":
        return "torch", "the Triton kernels need a CUDA or ROCm device"
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
def _warn_of_slow_backend(reason: str) -> None:
    warnings.warn(
        f"fused_distill: the GPU uses the PyTorch backend, which is slower than the Triton kernels: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def choose_backend(name: Backend, device: torch.device, dtype: torch.dtype) -> Literal["triton", "torch"]:
    """Return "triton" or "torch" for a backend option, a device and an accumulation dtype.

    Raises:
        ImportError: "triton" without Triton installed.
        ValueError: "triton" on a device or with a dtype that its kernels do not support.
    """
    if name == "auto":
        backend, reason = auto_backend(device, dtype)
        if backend == "torch" and device.type == "cuda" and dtype == torch.float32:
            _warn_of_slow_backend(reason)
        return backend
    if name == "torch":
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


def make_row_loss(
    name: str, config: LossConfig, k: int | None, device: torch.device, *, n_logits: int, sharded: bool
) -> RowLoss:
    """Return the row loss of a call.

    Args:
        name: "triton" or "torch".
        config: the loss's options.
        k: size of a top-k teacher's support; None for a full-vocabulary teacher.
        device: where the loss is computed.
        n_logits: logits of either model in the whole call; 0: nothing is compiled.
        sharded: several ranks share the vocabulary. They must derive equal chunk sizes, so these must not
            depend on whether a rank's compiler works.
    """
    compiled = n_logits >= _COMPILE_MIN_LOGITS and (Compiler.works or sharded)
    stages = StageRunner(compiled, sharded or not compiled, device.type)
    if k is None or not isinstance(config, TopKLossConfig):
        if name == "triton":
            from .full_triton import TritonJSD

            return TritonJSD()
        return TorchJSD(stages)
    if name == "triton":
        from .topk_triton import TritonSupportRowLoss, TritonTailRowLoss

        return TritonSupportRowLoss(k) if config.projects_support_only else TritonTailRowLoss(k)
    if config.projects_support_only:
        return SupportRowLoss(k)
    return TailRowLoss(k, TorchTail(stages))
