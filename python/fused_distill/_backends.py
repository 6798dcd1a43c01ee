"""Which row step a call runs on."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from ._engine import Backend
from ._rows import row_divergence
from ._settings import LossSettings, RowResult

# Below this many logits per call, compiling the row arithmetic costs more than it saves.
_COMPILE_MIN_LOGITS = 1 << 24
_BLOCK_ELEMENTS = 1 << 20


class _TorchRows:
    """Row arithmetic in PyTorch, compiled where that pays and works, else eager."""

    can_compile = True

    def __init__(self, compiled: bool):
        self.compiled = compiled

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor,
        settings: LossSettings,
        *,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        grad: Tensor | None,
        return_stats: bool,
        block_rows: int,
    ) -> RowResult:
        def rows(compiled: bool) -> RowResult:
            return row_divergence(
                student_logits,
                teacher_logits,
                weight,
                settings,
                student_bias=student_bias,
                teacher_bias=teacher_bias,
                labels=labels,
                grad=grad,
                return_stats=return_stats,
                block_rows=block_rows,
                compiled=compiled,
            )

        if not (self.compiled and _TorchRows.can_compile):
            return rows(False)
        try:
            return rows(True)
        except (
            Exception
        ) as error:  # a missing or broken compiler shows in many types, before any block is written
            _TorchRows.can_compile = False
            warnings.warn(
                f"fused_distill: torch.compile failed ({type(error).__name__}), the row arithmetic runs "
                "eagerly and several times slower; a C++ compiler on the PATH mends this",
                RuntimeWarning,
                stacklevel=2,
            )
            return rows(False)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, n_logits: int) -> Backend:
    """The backend for "auto", "triton" or "torch".

    Raises:
        ImportError: "triton" without Triton installed.
        ValueError: "triton" on a device or dtype that it does not serve.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        fits = device.type == "cuda" and dtype == torch.float32 and find_spec("triton") is not None
        name = "triton" if fits else "torch"
    if name == "torch":
        compiled = n_logits >= _COMPILE_MIN_LOGITS and _TorchRows.can_compile
        return Backend("torch", _TorchRows(compiled), _BLOCK_ELEMENTS, block_tensors=0 if compiled else 26)
    if find_spec("triton") is None:
        raise ImportError("backend='triton' needs Triton: pip install 'fused-distill[triton]'")
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or ROCm device, got student_hidden on {device}"
        )
    if dtype != torch.float32:
        raise ValueError("backend='triton' computes in float32; use backend='torch' for float64 inputs")
    from ._rows_triton import row_divergence as triton_row_divergence

    return Backend("triton", triton_row_divergence)
