"""Metrics of a run: means over tokens, metrics.jsonl, the console, trackers and a report."""

from __future__ import annotations

import base64
import html
import io
import json
import resource
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor

from .config import TrainConfig
from .data import Batch
from .targets import Scored

STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
CONSOLE_METRICS = ("loss", *STATISTICS[:2], "top1_agreement", "completion_length", "tokens_per_second")


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


class MetricsLogger:
    """Logs metrics on the main process; on other processes its methods do nothing."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, resumed_step: int):
        self.accelerator, self.config = accelerator, config
        self.path = config.output / "metrics.jsonl"
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            # A resumed run repeats the steps after its checkpoint.
            kept = [line for line in self.read() if line["step"] <= resumed_step] if resumed_step else []
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
            scratch.replace(self.path)
        if config.trackers:
            accelerator.init_trackers("fused-distill", {"config": config.model_dump_json()})

    def read(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without a truncated last line."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, step: int, kind: str, metrics: dict[str, float], samples: Sequence[str] = ()) -> None:
        """Log the metrics of a step (kind "train") or an evaluation (kind "evaluation")."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": step, "kind": kind, **metrics, **({"samples": list(samples)} if samples else {})}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in CONSOLE_METRICS if name in metrics)
        print(f"{kind} {step}/{self.config.steps}  {shown}", flush=True)
        if self.config.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def write_report(self) -> None:
        """Write report.html: curves, samples of the first and the last evaluation, and settings."""
        if not self.accelerator.is_main_process:
            return
        rows = self.read()
        sampled = [row for row in rows if "samples" in row]
        first_and_last = sampled[:1] + sampled[1:][-1:]
        samples = [f"Step {row['step']}\n{text}" for row in first_and_last for text in row["samples"]]
        page = (
            "<!doctype html><meta charset=utf-8><title>Distillation</title>"
            "<style>body{font:16px sans-serif;max-width:60rem;margin:auto}pre{white-space:pre-wrap}</style>"
            f"<h1>Distillation of {html.escape(self.config.student)}</h1>"
            f'<img alt="metrics by step" src="data:image/png;base64,{_plot(rows)}"><h2>Held-out samples</h2>'
            f"{''.join(f'<pre>{html.escape(sample)}</pre>' for sample in samples)}"
            f"<h2>Settings</h2><pre>{html.escape(self.config.model_dump_json(indent=1))}</pre>"
        )
        (self.config.output / "report.html").write_text(page)


def _plot(rows: list[dict[str, Any]]) -> str:
    """Return a curve of every metric as a PNG in base64."""
    names = dict.fromkeys(name for row in rows for name in row if isinstance(row[name], float))
    figure = Figure(figsize=(10, 1.5 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots((len(names) + 1) // 2, 2).flat, names, strict=False):
        for kind, style in (("train", "-"), ("evaluation", "o--")):
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=kind)
        axes.set(title=name, xlabel="optimizer step")
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return base64.b64encode(image.getvalue()).decode()
