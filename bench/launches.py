"""Record the launches of Triton kernels without a GPU, and compile exactly the recorded variants for any GPU.

A compiled kernel depends on more than its source: Triton specialises it on the alignment of each pointer
and on whether each integer is divisible by 16. So the arguments are those of a real call on tensors in CPU
memory. Its kernels are recorded instead of run: the numbers that the call returns mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from fused_distill.chunked import gemm
from fused_distill.rows import backend
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_run = JITFunction.run


@dataclass(frozen=True)
class _OfflineDriver:
    """What Triton asks of a driver before it compiles a kernel."""

    target: GPUTarget

    def get_current_device(self) -> str:
        return str(self.target)  # each target has its own cache of specialisations

    def get_current_stream(self, device: str) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    positional: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The kernel's arguments by name, with those of the launch such as num_warps."""
        return {**dict(zip(self.kernel.arg_names, self.positional, strict=False)), **self.keywords}

    @property
    def programs(self) -> int:
        """Program instances in the grid."""
        return torch.Size(self.grid).numel()

    def compile(self, target: GPUTarget) -> Any:
        """Return the compiled kernel as this launch specialises it."""
        keywords = dict(self.keywords)
        if target.backend == "hip" and keywords.pop("maxnreg", None):  # as launch.py does on such a device
            keywords["num_warps"] = keywords["num_warps"] * 32 // target.warp_size
        with patch.object(driver, "_active", _OfflineDriver(target)):
            return _run(self.kernel, *self.positional, grid=self.grid, warmup=True, **keywords)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches inside the context, which run nothing; backend="auto" selects the kernels."""
    launches: list[Launch] = []

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        del warmup
        if callable(grid):
            grid = grid(Launch(kernel, (), positional, keywords).arguments)
        launches.append(Launch(kernel, grid, positional, keywords))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(backend, "auto_backend", lambda device, dtype: ("triton", "launches are recorded")),
    ):
        yield launches


@contextmanager
def half_products_on_the_cpu() -> Iterator[None]:
    """Give the CPU the products of half-precision matrices into float32 that GPUs have."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        del out_dtype
        return out.copy_(a.float() @ b.float())

    def baddbmm(
        c: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor,
    ) -> Tensor:
        del out_dtype
        return out.copy_(beta * c + alpha * torch.bmm(a.float(), b.float()))

    with (
        patch.object(gemm, "_FP32_OUTPUT", {}),
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("baddbmm.dtype_out", baddbmm, "CPU")
        yield
