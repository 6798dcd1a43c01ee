"""Metrics of a step or an evaluation: means over tokens, times and memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import POLICIES
from .data import Batch
from .targets import Scored

STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


def batch_sums(scored: list[Scored], normalizer: float, teachers: Sequence[str]) -> Tensor:
    """Return the summed losses and statistics of a batch, (teachers, 6), without waiting for the device."""
    device = scored[0].loss.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(teachers), 1 + len(STATISTICS), dtype=dtype, device=device)
    for part, loss, stats, _ in scored:
        values = [loss.detach() * normalizer, *(getattr(stats, name).sum() for name in STATISTICS)]
        sums[teachers.index(part.name)] = torch.stack([value.to(dtype) for value in values])
    return sums


def sample_counts(batches: list[Batch], teachers: Sequence[str]) -> list[list[int]]:
    """Return, for each teacher, the numbers of samples, of completion tokens and of truncated samples."""
    samples = [[s for b in batches for s in b.samples if s.teacher == name] for name in teachers]
    return [[len(s), sum(len(x.completion) for x in s), sum(x.truncated for x in s)] for s in samples]


def mean_metrics(numbers: Sequence[float], teachers: Sequence[str]) -> dict[str, float]:
    """Return the means per sample and per token, of all teachers and of each, e.g. as math/loss.

    Args:
        numbers: `sample_counts` and added `batch_sums`, one teacher after the other.
        teachers: their names; a single one has none.
    """
    width = len(numbers) // len(teachers)
    rows = [numbers[i : i + width] for i in range(0, len(numbers), width)]
    metrics = _means([sum(column) for column in zip(*rows, strict=True)])
    for name, row in zip(teachers, rows, strict=True):
        if name and row[0]:
            metrics |= {f"{name}/{key}": value for key, value in _means(row).items()}
    return metrics


def _means(numbers: Sequence[float]) -> dict[str, float]:
    samples, tokens, truncated, *totals = numbers
    means = {"completion_length": tokens / samples, "truncated": truncated / samples, "tokens": tokens}
    names = ("loss", *STATISTICS)
    return means | {name: value / max(tokens, 1) for name, value in zip(names, totals, strict=True)}


def policy_losses(sums: list[Tensor], batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return loss and tokens of a step's on-policy and off-policy slices, as far as it has them.

    All processes call it together; each has slices of the same policies.
    """
    found = dict[str, Tensor]()
    for on_policy, name in zip((True, False), POLICIES, strict=True):
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
