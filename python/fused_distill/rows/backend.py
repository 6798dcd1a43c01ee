"""Which row step a call runs on."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

import torch

from ..chunked.loop import Backend
from .compiled import Compiler
from .full_torch import row_divergence
from .topk import SUPPORT_TENSORS, RestOperations, TopKRows, rest_gradient, rest_statistics

# Below this many logits per call, compiling the row arithmetic costs more than it saves.
_COMPILE_MIN_LOGITS = 1 << 24
_BLOCK_ELEMENTS = 1 << 20


def auto_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend that backend="auto" selects, and the reason.

    dtype is that of the logits: float64 where an input is float64, else float32.
    """
    if device.type != "cuda":
        return "torch", "the Triton kernels need a CUDA or ROCm device"
    if dtype != torch.float32:
        return "torch", "the Triton kernels compute in float32"
    if find_spec("triton") is None:
        return "torch", "Triton is not installed"
    return "triton", "a CUDA or ROCm device, float32 logits, and Triton is installed"


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "torch" for the public functions' backend.

    Raises:
        ImportError: "triton" without Triton installed.
        ValueError: "triton" on a device or dtype that it does not serve.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        return auto_backend(device, dtype)[0]
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


def full_backend(name: str, n_logits: int, sharded: bool) -> Backend:
    """The row step for a full-vocabulary teacher; n_logits of either model in the whole call."""
    if name == "triton":
        from .full_triton import row_divergence as triton_row_divergence

        return Backend(name, triton_row_divergence)
    compiled, block_tensors = _compiles(n_logits, sharded, 26)
    return Backend(name, partial(row_divergence, compiled=compiled), _BLOCK_ELEMENTS, block_tensors)


def topk_backend(
    name: str, n_logits: int, sharded: bool, tail: str, support_size: int, *, gathered: bool
) -> Backend:
    """The row step for a top-k teacher; gathered: the student's logits are those of the support alone."""
    row_bytes = SUPPORT_TENSORS * 8 * (support_size + 1)
    if gathered:
        return Backend(name, TopKRows(tail, None), row_bytes=row_bytes)
    if name == "triton":
        from . import tail_triton as _topk_rows_triton

        rest = RestOperations(_topk_rows_triton.rest_statistics, _topk_rows_triton.rest_gradient)
        return Backend(name, TopKRows(tail, rest), row_bytes=row_bytes)
    compiled, block_tensors = _compiles(n_logits, sharded, 8)
    rest = RestOperations(
        partial(rest_statistics, compiled=compiled), partial(rest_gradient, compiled=compiled)
    )
    return Backend(name, TopKRows(tail, rest), _BLOCK_ELEMENTS, block_tensors, row_bytes)


def _compiles(n_logits: int, sharded: bool, block_tensors: int) -> tuple[bool, int]:
    """Whether to compile, and how many of the eager temporaries of a block to plan for.

    Over a process group the plan must not depend on whether this rank's compiler works.
    """
    compiled = n_logits >= _COMPILE_MIN_LOGITS and (Compiler.works or sharded)
    return compiled, 0 if compiled and not sharded else block_tensors
