"""Which library multiplies float32 matrices on this CPU: torch.mm, which calls MKL on x86, or oneDNN."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

VARIABLE = "FUSED_DISTILL_CPU_PRODUCT"
# oneDNN writes its result into a new tensor, which costs memory. It must be clearly faster to be worth it.
_WORTHWHILE = 1.25


@dataclass(frozen=True)
class CPUProduct:
    """The library that multiplies float32 matrices on the CPU, and why."""

    library: Literal["torch", "onednn"]
    reason: str


def onednn_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a (m, k) @ b (k, n) in a new tensor, computed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def cpu_product() -> CPUProduct:
    """Return what multiplies float32 matrices on the CPU.

    The faster library depends on the processor: MKL disables its AVX-512 kernels on AMD processors, where
    oneDNN is up to twice as fast if they have AVX-512 and about as fast as MKL if they have not. The first
    call therefore measures both, in 10 to 40 ms. oneDNN is chosen if it is at least 1.25 times as fast.

    Results of the two libraries differ by rounding. Set the environment variable FUSED_DISTILL_CPU_PRODUCT to
    `torch` or `onednn` if results must be bitwise equal in several processes.

    Raises:
        ValueError: if the environment variable has another value, or names oneDNN where it does not work.
    """
    return _choose(os.environ.get(VARIABLE))


@lru_cache
def _choose(requested: str | None) -> CPUProduct:
    if requested not in (None, "torch", "onednn"):
        raise ValueError(f"the environment variable {VARIABLE} must be torch or onednn, got {requested!r}")
    if requested == "torch":
        return CPUProduct("torch", f"{VARIABLE}=torch")
    # A thread of its own knows nothing of the caller's autocast, default device and dispatch modes.
    with ThreadPoolExecutor(max_workers=1) as thread:
        if not thread.submit(_onednn_works).result():
            if requested == "onednn":
                raise ValueError(
                    f"{VARIABLE}=onednn, but torch {torch.__version__} has no oneDNN product here"
                )
            return CPUProduct("torch", "oneDNN has no float32 product here")
        if requested == "onednn":
            return CPUProduct("onednn", f"{VARIABLE}=onednn")
        torch_seconds, onednn_seconds = thread.submit(_measure).result()
    library = "onednn" if torch_seconds >= _WORTHWHILE * onednn_seconds else "torch"
    took = f"{1e3 * torch_seconds:.1f} ms by torch.mm, {1e3 * onednn_seconds:.1f} ms by oneDNN"
    return CPUProduct(library, f"three products: {took}")


def _onednn_works() -> bool:
    """Return True if this torch has oneDNN's product and it is right."""
    a = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    b = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    try:
        return torch.backends.mkldnn.is_available() and torch.equal(onednn_mm(a, b), a @ b)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _measure() -> tuple[float, float]:
    """Return the seconds that a loss's three products take by torch.mm and by oneDNN, on a small LM head."""
    rows, width, vocabulary = 64, 512, 1024
    logits = torch.empty(rows, vocabulary, dtype=torch.float32)
    hidden, weight = (torch.full((n, width), 0.5, dtype=torch.float32) for n in (rows, vocabulary))
    grad_hidden, grad_weight = hidden.clone(), weight.clone()

    def by_torch() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.addmm(grad_weight, logits.T, hidden, out=grad_weight)

    def by_onednn() -> None:
        logits.copy_(onednn_mm(hidden, weight.T))
        grad_hidden.copy_(onednn_mm(logits, weight))
        grad_weight.add_(onednn_mm(logits.T, hidden))

    rounds: list[tuple[float, float]] = []
    for _ in range(7):  # their median, so that a short disturbance by other processes decides nothing
        ends = [perf_counter()]
        for products in (by_torch, by_onednn):
            products()
            ends.append(perf_counter())
        rounds.append((ends[1] - ends[0], ends[2] - ends[1]))
    return sorted(rounds, key=lambda seconds: seconds[0] / seconds[1])[len(rounds) // 2]
