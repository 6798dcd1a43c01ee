"""What the checks of a first run on a GPU share: their registry, sizes and clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from models import QWEN3, QWEN3_LARGE, QWEN3_MEDIUM
from torch import Tensor


class CheckSkipped(Exception):
    """A check cannot run here; the message says why."""


@dataclass
class CheckResult:
    """Numbers, one dict per line of the report, and what is wrong with them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def expect(self, right: bool, problem: str) -> None:
        """Add a problem unless what was expected holds."""
        if not right:
            self.problems.append(problem)


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and at what sizes."""

    device: torch.device
    small: bool

    @property
    def tokens(self) -> int:
        """Tokens of a call whose time counts."""
        return 24 if self.small else 8192

    @property
    def vocab(self) -> int:
        """The vocabulary of Qwen 3."""
        return 320 if self.small else QWEN3.vocab

    @property
    def vocabs(self) -> tuple[int, ...]:
        """Vocabularies for comparisons with float64: Qwen 3's, GPT-2's, Llama 2's with a pad token."""
        return (320, 129, 97) if self.small else (QWEN3.vocab, 50257, 32001)

    @property
    def dimensions(self) -> list[tuple[int, int]]:
        """Hidden sizes of student and teacher, of three pairs of Qwen 3 models."""
        return [(16, 32)] if self.small else [pair.dims for pair in (QWEN3, QWEN3_MEDIUM, QWEN3_LARGE)]

    def randn(
        self, *size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> Tensor:
        """Return normal numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device).mul_(scale).to(dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], object], rounds: int = 5) -> float:
        """Return the median time of a step after two others, by CUDA events on a GPU."""
        for _ in range(2):
            step()
        self.synchronize()
        times: list[float] = []
        for _ in range(1 if self.small else rounds):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                step()
                end.record()
                self.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
        return statistics.median(times)


class Check(NamedTuple):
    """A check of the first run."""

    name: str
    needs_cuda: bool
    function: Callable[[Setting], CheckResult]


CHECKS: list[Check] = []


def check(name: str, needs_cuda: bool = False) -> Callable[[Callable[[Setting], CheckResult]], Any]:
    """Register a function as a check of the first run."""

    def register(function: Callable[[Setting], CheckResult]) -> Callable[[Setting], CheckResult]:
        CHECKS.append(Check(name, needs_cuda, function))
        return function

    return register


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected, in float64."""
    difference = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return difference / size if size else difference
