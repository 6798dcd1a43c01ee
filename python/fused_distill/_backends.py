"""Which row step a call runs on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ._engine import Backend
from ._rows import row_divergence
from ._topk_rows import SUPPORT_TENSORS, RestOperations, TopKRows, rest_gradient, rest_statistics

# Below this many logits per call, compiling the row arithmetic costs more than it saves.
_COMPILE_MIN_LOGITS = 1 << 24
_BLOCK_ELEMENTS = 1 << 20


class Compiling:
    """A function of row arithmetic, run compiled where that works, else eagerly."""

    can_compile = True

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function's result."""
        if not Compiling.can_compile:
            return self.function(*args, **options)
        try:
            return self.function(*args, **options, compiled=True)
        except Exception as error:  # a missing or broken compiler shows in many types, before any write
            Compiling.can_compile = False
            warnings.warn(
                f"fused_distill: torch.compile failed ({type(error).__name__}), the row arithmetic runs "
                "eagerly and several times slower; a C++ compiler on the PATH mends this",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.function(*args, **options)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "torch" for the public functions' backend.

    Raises:
        ImportError: "triton" without Triton installed.
        ValueError: "triton" on a device or dtype that it does not serve.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        fits = device.type == "cuda" and dtype == torch.float32 and find_spec("triton") is not None
        return "triton" if fits else "torch"
    if name == "torch":
        return name
    if find_spec("triton") is None:
        raise ImportError("backend='triton' needs Triton: pip install 'fused-distill[triton]'")
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or ROCm device, got student_hidden on {device}"
        )
    if dtype != torch.float32:
        raise ValueError("backend='triton' computes in float32; use backend='torch' for float64 inputs")
    return name


def _compiles(n_logits: int) -> bool:
    return n_logits >= _COMPILE_MIN_LOGITS and Compiling.can_compile


def full_backend(name: str, n_logits: int) -> Backend:
    """The row step for a full-vocabulary teacher; n_logits of either model in the whole call."""
    if name == "triton":
        from ._rows_triton import row_divergence as triton_row_divergence

        return Backend(name, triton_row_divergence)
    if _compiles(n_logits):
        return Backend(name, Compiling(row_divergence), _BLOCK_ELEMENTS)
    return Backend(name, row_divergence, _BLOCK_ELEMENTS, block_tensors=26)


def topk_backend(name: str, n_logits: int, tail: str, support_size: int, *, gathered: bool) -> Backend:
    """The row step for a top-k teacher; gathered: the student's logits are those of the support alone."""
    row_bytes = SUPPORT_TENSORS * 8 * (support_size + 1)
    if gathered:
        return Backend(name, TopKRows(tail, None), row_bytes=row_bytes)
    if name == "triton":
        from . import _topk_rows_triton

        rest = RestOperations(_topk_rows_triton.rest_statistics, _topk_rows_triton.rest_gradient)
        return Backend(name, TopKRows(tail, rest), row_bytes=row_bytes)
    if _compiles(n_logits):
        rest = RestOperations(Compiling(rest_statistics), Compiling(rest_gradient))
        return Backend(name, TopKRows(tail, rest), _BLOCK_ELEMENTS, row_bytes=row_bytes)
    rest = RestOperations(rest_statistics, rest_gradient)
    return Backend(name, TopKRows(tail, rest), _BLOCK_ELEMENTS, block_tensors=8, row_bytes=row_bytes)
