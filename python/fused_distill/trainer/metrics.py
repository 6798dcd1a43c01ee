"""Metrics of a step or an evaluation: means over tokens, times and memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import POLICIES
from .targets import Kind, Scored, Teacher

STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
# Sums over the tokens that a teacher scores, and before them its samples, tokens and truncated samples.
COLUMNS = ("loss", *STATISTICS, "student_mass", "teacher_mass")
COUNTS = 3


def metric_names(kind: Kind) -> dict[str, str]:
    """Return the names under which a kind of targets logs the columns that it gives."""
    if kind == "sampled":
        return {"loss": "loss", "reverse_kl": "sampled_reverse_kl"}
    if kind in ("topk", "student_topk"):
        return {name: f"topk_{name}" if name in STATISTICS else name for name in COLUMNS}
    return {"loss": "full_loss" if kind == "exact" else "loss", **{name: name for name in STATISTICS}}


class Sums:
    """What the samples of a step or an evaluation add up to, for each policy and teacher."""

    def __init__(self, teachers: Mapping[str, Teacher], device: torch.device):
        self.teachers = teachers
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._counts = [[[0] * COUNTS for _ in teachers] for _ in POLICIES]
        self._sums = torch.zeros(len(POLICIES), len(teachers), len(COLUMNS), dtype=dtype, device=device)

    def add(self, scored: Sequence[Scored], normalizer: float) -> None:
        """Add the parts of a batch, whose samples have one policy, without waiting for the device."""
        for part, loss, stats, _ in scored:
            policy = POLICIES.index("on_policy" if part.samples[0].on_policy else "off_policy")
            teacher = [*self.teachers].index(part.name)
            counts, samples = self._counts[policy][teacher], part.samples
            counts[0] += len(samples)
            counts[1] += sum(len(sample.completion) for sample in samples)
            counts[2] += sum(sample.truncated for sample in samples)
            columns = (getattr(stats, name) for name in COLUMNS[1:])
            unknown = loss.new_full((), torch.nan)
            values = [loss.detach() * normalizer, *(unknown if c is None else c.sum() for c in columns)]
            self._sums[policy, teacher] += torch.stack([value.to(self._sums) for value in values])

    def read(
        self, accelerator: Accelerator, by_policy: bool, ratios: Tensor | None = None, **others: Tensor
    ) -> dict[str, float]:
        """Return the means per sample and per token, of all teachers and of each, e.g. as math/loss.

        All processes call it together. It communicates once, and the host waits for the device here alone. A
        mean over several teachers is over the tokens of those that log the metric.

        Args:
            accelerator: of the run.
            by_policy: also return loss and tokens of each policy.
            ratios: see `ImportanceRatios.take`.
            others: numbers (), the same in all processes, which are returned too.
        """
        sums = torch.cat([self._sums.new_tensor(self._counts), self._sums], -1)
        parts = [*others.values(), *([] if ratios is None else [ratios]), sums]
        local = torch.cat([part.to(sums).flatten() for part in parts])
        gathered: Any = accelerator.gather(local[None])
        columns: list[tuple[float, ...]] = [*zip(*gathered.tolist(), strict=True)]
        metrics = {name: columns.pop(0)[0] for name in others}
        if ratios is not None:
            totals, numbers, largest = (columns.pop(0) for _ in range(3))
            metrics |= {"ratio_mean": sum(totals) / max(sum(numbers), 1), "ratio_max": max(largest)}
        numbers, width, rows = [sum(column) for column in columns], sums.shape[-1], list[_Row]()
        for policy in POLICIES:
            for name, teacher in self.teachers.items():
                rows.append(_Row(policy, name, teacher.kind, numbers[:width]))
                del numbers[:width]
        rows = [row for row in rows if row.numbers[0]]  # has samples
        metrics |= _means(rows)
        for name in dict.fromkeys(row.teacher for row in rows if row.teacher):
            own = _means([row for row in rows if row.teacher == name])
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
        for policy in dict.fromkeys(row.policy for row in rows if by_policy):
            own = _means([row for row in rows if row.policy == policy])
            metrics |= {f"{policy}/{key}": own[key] for key in ("loss", "tokens")}
        return metrics


class _Row(NamedTuple):
    policy: str
    teacher: str
    kind: Kind
    numbers: Sequence[float]  # counts and columns


def _means(rows: Sequence[_Row]) -> dict[str, float]:
    samples, tokens, truncated = (sum(row.numbers[i] for row in rows) for i in range(COUNTS))
    totals, known = defaultdict[str, float](float), defaultdict[str, float](float)
    for row in rows:
        for column, name in metric_names(row.kind).items():
            total = row.numbers[COUNTS + COLUMNS.index(column)]
            if column != "student_mass" or not isnan(total):
                totals[name] += total
                known[name] += row.numbers[1]
    means = {name: total / max(known[name], 1) for name, total in totals.items()}
    return {"completion_length": tokens / samples, "truncated": truncated / samples, "tokens": tokens} | means


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
