"""Tests on a GPU: what a test makes without a device is made there, and what concerns the CPU is skipped.

Used where FUSED_DISTILL_TEST_DEVICE names a GPU. Numbers are drawn on the CPU and moved, so that a test has
the same ones everywhere. Tensors that the library makes are left alone: it must choose their device itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DEVICE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TESTS = Path(__file__).parents[1]
MODULES = Path(torch.nn.__file__).parent / "modules"

# Tests, by file or by file and name, that do not concern a GPU.
CPU_ONLY = {
    "test_gemm.py": "emulates a GPU's matrix products on the CPU",
    "test_dtensor.py": "shards parameters over a mesh of CPU processes",
    "test_vocab_shard.py::test_gradients_under_torchs_tensor_parallelism_equal_the_oracle": (
        "shards modules over a mesh of CPU processes"
    ),
    "test_vocab_shard.py::test_invalid_call_is_refused_on_every_rank": "makes a mesh of CPU processes",
    "test_contexts.py::test_caller_compiled_with_inductor_gets_the_same_results": (
        "torch.compile does not trace the mode below"
    ),
}


class TensorsOnDevice(TorchFunctionMode):
    """Moves tensors that test files and modules make without a device to one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None or not _called_by_a_test():
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        result: Tensor = func(*args, **kwargs)
        return result.to(self.device).requires_grad_(requires_grad)


def _called_by_a_test() -> bool:
    """Return whether a file of the tests, or a module of torch.nn, called the torch function."""
    path = Path(sys._getframe(2).f_code.co_filename)
    return TESTS in path.parents or MODULES in path.parents


def make_tensors_on_device() -> None:
    """Make the tensors of tests on the device under test from now on."""
    if DEVICE.type != "cpu":
        TensorsOnDevice(DEVICE).__enter__()


def why_cpu_only(nodeid: str) -> str | None:
    """Return why a test runs on the CPU only, None if it runs on a GPU too."""
    name = nodeid.split("[")[0].rpartition("/")[2]
    return CPU_ONLY.get(name, CPU_ONLY.get(name.split("::")[0]))
