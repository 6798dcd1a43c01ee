"""What a run says of itself: a console line, metrics.jsonl, trackers, samples, and a report at the end."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console

from .config import ConfigError, TrainConfig

SHOWN = ("loss", "forward_kl", "reverse_kl", "top1_agreement", "completion_length", "tokens_per_second")
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


class Journal:
    """Of the main process; the others' calls do nothing."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, resumed_at: int):
        self.accelerator, self.config = accelerator, config
        self.console = Console(quiet=not accelerator.is_main_process)
        self.path = config.output / "metrics.jsonl"
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            self._drop_after(resumed_at)
        for name in config.trackers:
            if find_spec(name) is None:
                raise ConfigError(f"trackers: {name} is not installed")
        if config.trackers:
            accelerator.init_trackers("fused-distill", {"config": config.model_dump_json()})

    def _drop_after(self, step: int) -> None:
        """A run that goes on from a checkpoint repeats the steps after it."""
        kept = [line for line in self.rows() if line["step"] <= step] if step else []
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds; a last line that was cut off is none."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, step: int, kind: str, metrics: dict[str, float], samples: Sequence[str] = ()) -> None:
        """One line for a step ("train") or an evaluation ("evaluation")."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": step, "kind": kind, **metrics, **({"samples": list(samples)} if samples else {})}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        self.console.print(f"{kind} {step}/{self.config.steps}  {shown}", highlight=False, soft_wrap=True)
        if self.config.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def report(self) -> None:
        """report.html: settings, curves, the first and the last samples, in one file."""
        if not self.accelerator.is_main_process:
            return
        rows = self.rows()
        sampled = [row for row in rows if "samples" in row]
        texts = "".join(
            f"<h3>Step {row['step']}</h3>" + "".join(f"<pre>{html.escape(s)}</pre>" for s in row["samples"])
            for row in ([sampled[0], sampled[-1]] if len(sampled) > 1 else sampled)
        )
        settings = html.escape(json.dumps(json.loads(self.config.model_dump_json()), indent=1))
        page = (
            "<!doctype html><meta charset=utf-8><title>Distillation</title>"
            "<style>body{font:16px sans-serif;max-width:60rem;margin:auto}pre{white-space:pre-wrap}</style>"
            f"<h1>Distillation of {html.escape(self.config.student)}</h1>"
            f'<img alt="metrics by step" src="data:image/png;base64,{_curves(rows)}">'
            f"<h2>Held-out samples</h2>{texts}<h2>Settings</h2><pre>{settings}</pre>"
        )
        (self.config.output / "report.html").write_text(page)


def _curves(rows: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(10, 11), layout="constrained")
    axes = figure.subplots((len(PLOTS) + 1) // 2, 2)
    for one, names in zip(axes.flat, PLOTS, strict=True):
        for i, name in enumerate(names):
            for kind, style in (("train", "-"), ("evaluation", "o--")):
                points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
                if points:
                    one.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{name}, {kind}")
        one.set_xlabel("optimizer step")
        one.legend(fontsize=7, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return base64.b64encode(image.getvalue()).decode()
