"""Environment report for bug reports: `fused-distill env`, or `python -m fused_distill.env`.

Needs torch alone. Versions of other packages are read from their metadata, without importing them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from .chunked.cpu_product import VARIABLE as CPU_PRODUCT
from .chunked.cpu_product import cpu_product
from .rows.backend import auto_backend
from .rows.cpp.library import CACHE_VARIABLE as CPP_CACHE

PACKAGES = ("fused-distill", "triton", "transformers", "accelerate", "trl", "liger-kernel", "vllm", "httpx")
VARIABLES = (
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CXX",
    CPP_CACHE,
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    CPU_PRODUCT,
)


def report() -> str:
    """Return the report as plain text, one `name: value` per line."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else cuda
    lines = [
        f"OS: {platform.platform()}",
        f"Python: {platform.python_version()}",
        f"torch: {torch.__version__} ({build})",
        *(f"{name}: {_installed_version(name)}" for name in PACKAGES),
        *(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ),
    ]
    for device, description, usable in _devices():
        lines += ["", f"{device}: {description}"]
        if not usable:
            continue
        for inputs, dtype in (("", torch.float32), (" for float64 inputs", torch.float64)):
            backend, reason = auto_backend(device, dtype)
            lines.append(f'  backend="auto"{inputs}: {backend} ({reason})')
        if device.type == "cpu":
            lines.append(f"  float32 matrix products: {_cpu_gemm()}")
    return "\n".join(lines)


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[torch.device, str, bool]]:
    """Yield each device with its description and whether it can be used."""
    cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield torch.device("cpu"), f"{_cpu_model()}, {threads} threads, capability {cpu}", True
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            gpu = cast(Any, torch.cuda).get_device_properties(index)
        except (RuntimeError, AssertionError) as error:  # e.g. the driver is too old
            yield device, f"cannot be used: {error}", False
            continue
        architecture = gpu.gcnArchName if torch.version.hip else f"{gpu.major}.{gpu.minor}"
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        yield device, f"{gpu.name}, {memory}, compute capability {architecture}", True


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cpu_gemm() -> str:
    product = cpu_product()
    name = {"torch": "torch.mm", "onednn": "oneDNN"}[product.library]
    mkl = "available" if torch.backends.mkl.is_available() else "not available"
    return f"{name} ({product.reason}; MKL {mkl})"


if __name__ == "__main__":
    print(report())
