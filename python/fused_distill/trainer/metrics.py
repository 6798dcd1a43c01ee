"""Metrics of a step or an evaluation: means over tokens, times and memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..stats import DistillStats
from .data import Batch

STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


def batch_sums(loss: Tensor, stats: DistillStats) -> Tensor:
    """Return the summed loss of a batch and the sums of its statistics, without waiting for the device."""
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    sums = [loss.detach(), *(getattr(stats, name).sum() for name in STATISTICS)]
    return torch.stack([value.to(dtype) for value in sums])


def sample_counts(batches: list[Batch]) -> list[int]:
    """Return the numbers of samples, of completion tokens and of truncated samples."""
    truncated = [sample.truncated for batch in batches for sample in batch.samples]
    return [len(truncated), sum(sum(batch.lengths) for batch in batches), sum(truncated)]


def mean_metrics(numbers: list[float]) -> dict[str, float]:
    """Return the metrics of `sample_counts` and added `batch_sums`: means per sample and means per token."""
    samples, tokens, truncated, *totals = numbers
    means = {"completion_length": tokens / samples, "truncated": truncated / samples, "tokens": tokens}
    names = ("loss", *STATISTICS)
    return means | {name: value / max(tokens, 1) for name, value in zip(names, totals, strict=True)}


def policy_losses(sums: list[Tensor], batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return loss and tokens of a step's on-policy and off-policy slices, as far as it has them.

    All processes call it together; each has slices of the same policies.
    """
    found = dict[str, Tensor]()
    for on_policy, name in ((True, "on_policy"), (False, "off_policy")):
        chosen = [i for i, batch in enumerate(batches) if batch.samples[0].on_policy == on_policy]
        if chosen:
            loss = torch.stack([sums[i][..., 0].sum() for i in chosen]).sum()
            tokens = loss.new_tensor(float(sum(len(batches[i].valid) for i in chosen)))
            total: Any = accelerator.reduce(torch.stack([loss, tokens]), "sum")
            found |= {f"{name}/loss": total[0] / total[1].clamp(min=1), f"{name}/tokens": total[1]}
    return found


def memory_gib(device: torch.device) -> float:
    """Return this process's peak memory: of the GPU if it uses one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Timer:
    """Measures the parts of a step: on a CUDA device by events, which the host waits for in `read` only."""

    def __init__(self, device: torch.device):
        self._on_cuda, self._parts = device.type == "cuda", list[tuple[str, Any, Any]]()

    @contextmanager
    def measure(self, name: str) -> Generator[None, None, None]:
        """Measure the time spent inside, on a CUDA device from the end of the work queued before."""
        start = self._now()
        yield
        self._parts.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part; the host waits for the device."""
        seconds = defaultdict[str, float](float)
        for name, start, end in self._parts:
            if self._on_cuda:
                end.synchronize()
            seconds[name] += start.elapsed_time(end) / 1000 if self._on_cuda else end - start
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
