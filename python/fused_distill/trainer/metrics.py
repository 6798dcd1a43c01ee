"""Metrics of a run: means over tokens, metrics.jsonl, the console, trackers and a report."""

from __future__ import annotations

import base64
import html
import io
import json
import resource
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from ..stats import DistillStats
from .config import ConfigError, TrainConfig
from .data import Batch

STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
N_SUMS = 5 + len(STATISTICS)
CONSOLE_METRICS = (
    *("loss", "forward_kl", "reverse_kl", "top1_agreement"),
    *("completion_length", "tokens_per_second"),
)
PLOTS = (
    ("loss",),
    ("forward_kl", "reverse_kl"),
    ("student_entropy", "teacher_entropy"),
    ("top1_agreement",),
    ("completion_length",),
    ("truncated",),
    ("rollout_seconds", "teacher_seconds", "update_seconds"),
    ("memory_gib",),
)


def zero_sums(device: torch.device) -> Tensor:
    """Return the sums of no batch, in the widest dtype of the device."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(N_SUMS, dtype=dtype, device=device)


def add_batch(sums: Tensor, batch: Batch, loss: Tensor, stats: DistillStats) -> Tensor:
    """Return `sums` with a batch added: counts of samples and tokens, the loss and the statistics."""
    samples = batch.samples
    lengths = [len(samples), sum(len(s.completion) for s in samples), sum(s.truncated for s in samples)]
    per_token = [batch.mask.sum(), loss.detach(), *(getattr(stats, name).sum() for name in STATISTICS)]
    return sums + torch.cat([sums.new_tensor(lengths), torch.stack([value.to(sums) for value in per_token])])


def mean_metrics(sums: Tensor) -> dict[str, float]:
    """Return means per token, means per sample of length and truncation, and the number of tokens."""
    samples, length, truncated, tokens, *totals = sums.tolist()
    means = {"completion_length": length / samples, "truncated": truncated / samples, "tokens": tokens}
    names = ("loss", *STATISTICS)
    return means | {name: value / max(tokens, 1) for name, value in zip(names, totals, strict=True)}


def memory_gib(device: torch.device) -> float:
    """Return this process's peak memory: of the GPU if it uses one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsLogger:
    """Logs metrics on the main process; on other processes its methods do nothing."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, resumed_step: int):
        self.accelerator, self.config = accelerator, config
        self.console = Console(quiet=not accelerator.is_main_process)
        self.path = config.output / "metrics.jsonl"
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            self._drop_after(resumed_step)
        for name in config.trackers:
            if find_spec(name) is None:
                raise ConfigError(f"trackers: {name} is not installed")
        if config.trackers:
            accelerator.init_trackers("fused-distill", {"config": config.model_dump_json()})

    def _drop_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run repeats."""
        kept = [line for line in self.read() if line["step"] <= step] if step else []
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(self.path)

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
        self.console.print(f"{kind} {step}/{self.config.steps}  {shown}", highlight=False, soft_wrap=True)
        if self.config.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def write_report(self) -> None:
        """Write report.html: curves, samples of the first and the last evaluation, settings, in one file."""
        if not self.accelerator.is_main_process:
            return
        rows = self.read()
        sampled = [row for row in rows if "samples" in row]
        samples = "".join(
            f"<h3>Step {row['step']}</h3>" + "".join(f"<pre>{html.escape(s)}</pre>" for s in row["samples"])
            for row in ([sampled[0], sampled[-1]] if len(sampled) > 1 else sampled)
        )
        settings = html.escape(json.dumps(json.loads(self.config.model_dump_json()), indent=1))
        page = (
            "<!doctype html><meta charset=utf-8><title>Distillation</title>"
            "<style>body{font:16px sans-serif;max-width:60rem;margin:auto}pre{white-space:pre-wrap}</style>"
            f"<h1>Distillation of {html.escape(self.config.student)}</h1>"
            f'<img alt="metrics by step" src="data:image/png;base64,{_plot(rows)}">'
            f"<h2>Held-out samples</h2>{samples}<h2>Settings</h2><pre>{settings}</pre>"
        )
        (self.config.output / "report.html").write_text(page)


def _plot(rows: list[dict[str, Any]]) -> str:
    """Return the curves of all metrics as a PNG in base64."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    panels = figure.subplots((len(PLOTS) + 1) // 2, 2)
    for axes, names in zip(panels.flat, PLOTS, strict=True):
        for i, name in enumerate(names):
            for kind, style in (("train", "-"), ("evaluation", "o--")):
                points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{name}, {kind}")
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=7, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return base64.b64encode(image.getvalue()).decode()
