"""Curves of on-policy distillation for each beta and each kind of teacher, with the same seeds.

    make demo && python bench/distillation.py [--teacher PATH] [--output FILE] [KEY=VALUE ...]

The student that the demo starts from learns from Gemma 3 270M on its own completions only: beta 0, 0.5 and 1,
with the teacher in the process, behind a server that returns top 64 log-probabilities, and behind one that
returns hidden states. Each student is evaluated at the end against the full distribution. JSON and a plot go
to bench/results/. Runs with hidden states repeat the local ones up to rounding, until rounding changes a
token that the student samples. The results say for how many steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import product, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fused_distill.trainer.config import TrainConfig, load_config
from fused_distill.trainer.loop import Trainer, train
from servers import running
from suite import ROOT, header, results_folder, write_json

SETTINGS = ("student=outputs/demo/start", "lmbda=1", "steps=24", "evaluate_every=8", "precision=fp32")
BETAS = (0.0, 0.5, 1.0)
TEACHERS: dict[str, tuple[str, ...]] = {
    "local": (),
    "served top 64": ("teacher.targets=topk", "teacher.k=64"),
    "served hidden states": (),
}
STATISTICS = ("forward_kl", "reverse_kl", "top1_agreement")
SAME = 1e-4  # relative difference of losses; with other completions they differ by some percent
METRICS = ("loss", *STATISTICS, *(f"topk_{name}" for name in STATISTICS))


def rows(teacher: Path, overrides: list[str], scratch: Path) -> list[dict[str, Any]]:
    """Return a row per step and evaluation of all runs; the last evaluation has kind "full distribution"."""
    results: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "fused_distill.cli", "serve-teacher", str(teacher), "--dtype", "float32"]

    def settings(*more: str) -> TrainConfig:
        return load_config(ROOT / "examples" / "demo.yaml", [*SETTINGS, *overrides, *more])

    with running(command, scratch / "log") as server:
        for beta, (name, targets) in product(BETAS, TEACHERS.items()):
            local = f"model: {teacher}, dtype: float32"
            source = f"url: {server.url}" if "served" in name else local
            output = scratch / "run"
            student = train(settings(f"teacher={{{source}}}", f"output={output}", f"beta={beta}", *targets))
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            final = settings(f"teacher={{{local}}}", f"student={student}", f"beta={beta}")
            end, _ = Trainer(final).evaluate()
            lines.append({"step": final.steps, "kind": "full distribution", **end})
            results += [
                {"beta": beta, "teacher": name}
                | {k: line[k] for k in ("step", "kind", *METRICS) if k in line}
                for line in lines
            ]
            shutil.rmtree(output)
    return results


def repeated(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each beta, how many steps with hidden states repeat the local run, and how closely.

    `max_relative_difference` is that of the losses of these steps.
    """

    def losses(beta: float, teacher: str) -> list[float]:
        run = [row for row in rows if (row["beta"], row["teacher"], row["kind"]) == (beta, teacher, "train")]
        return [row["loss"] for row in run]

    result: dict[str, dict[str, float]] = {}
    for beta in BETAS:
        pairs = zip(losses(beta, "local"), losses(beta, "served hidden states"), strict=True)
        differences = list(takewhile(lambda d: d < SAME, (abs(a - b) / a for a, b in pairs)))
        result[f"beta {beta:g}"] = {
            "steps": len(differences),
            "max_relative_difference": max(differences, default=0.0),
        }
    return result


def plot(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, beta in enumerate(BETAS):
        for i, teacher in enumerate(TEACHERS):
            run = [r for r in content["rows"] if (r["beta"], r["teacher"]) == (beta, teacher)]
            for row, metric, style in ((0, "loss", "-"), (1, "forward_kl", "-"), (1, "reverse_kl", "--")):
                shown = [r for r in run if metric in r and (r["kind"] == "train") == (metric == "loss")]
                points = [(r["step"], r[metric]) for r in shown]
                label = teacher if metric == "loss" else f"{metric.replace('_kl', ' KL')}, {teacher}"
                marker = {"marker": "x", "linestyle": "none"} if "hidden" in teacher else {"linestyle": style}
                if len(points) == 1:  # of the full distribution, which top 64 do not give during training
                    marker = {"marker": "o"}
                axes[row, column].plot(*zip(*points, strict=True), color=f"C{i}", label=label, **marker)
        axes[0, column].set_title(f"beta {beta:g}: loss of each step", fontsize=9, loc="left")
        axes[1, column].set_title("held-out prompts, nats per token", fontsize=9, loc="left")
        axes[1, column].sharey(axes[1, 0])
    for panel in axes.flat:
        panel.set_xlabel("optimizer step", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=7)
    styles = axes[1, 0].get_legend_handles_labels()
    figure.legend(*styles, frameon=False, fontsize=7, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("outputs/demo/teacher"), help="local path")
    parser.add_argument("--output", type=Path, default=results_folder(False) / "distillation.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of examples/demo.yaml")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        results = rows(arguments.teacher, arguments.overrides, Path(scratch))
    content = {
        **header(),
        "hidden_states_repeat_local": repeated(results),
        "rows": results,
    }
    write_json(arguments.output, content)
    plot(content, arguments.output.with_suffix(".png"))
    print(arguments.output, content["hidden_states_repeat_local"])


if __name__ == "__main__":
    main()
