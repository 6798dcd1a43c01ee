"""Time spent in the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Measures parts of a step; on a GPU with events, so that only reading the times waits for the GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Callable[[], float]]] = []
        self.reset = self._spans.clear

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._spans.append((name, lambda: start.elapsed_time(end) / 1000))
        else:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
            self._spans.append((name, lambda: seconds))

    def seconds(self) -> dict[str, float]:
        """Return the seconds per name since the last reset."""
        if self._on_gpu:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, read in self._spans:
            totals[name] += read()
        return dict(totals)
