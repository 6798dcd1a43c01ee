"""Curves of the demo's run for each beta and each way to the teacher, on the same seeds.

    make demo && python bench/distillation.py [--teacher PATH] [--output FILE] [KEY=VALUE ...]

Five runs of examples/demo.yaml: beta 0, 0.5 and 1 with the teacher in the process, and beta 0 with a teacher
server that gives its top 64 log-probabilities, and one that gives hidden states. JSON and a plot go to
bench/results/. The run with hidden states must repeat the local one up to rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fused_distill.trainer.config import load_config
from fused_distill.trainer.loop import train
from servers import running
from suite import ROOT, header, results_folder, write_json

sys.path.insert(0, str(ROOT / "examples"))
import demo

RUNS: dict[str, tuple[str, ...]] = {
    "beta 0, local teacher": ("beta=0",),
    "beta 0.5, local teacher": ("beta=0.5",),
    "beta 1, local teacher": ("beta=1",),
    "beta 0, served top 64": ("beta=0", "teacher.targets=topk", "teacher.k=64"),
    "beta 0, served hidden states": ("beta=0",),
}
METRICS = ("loss", "forward_kl", "reverse_kl", "top1_agreement")


def rows(teacher: Path, overrides: list[str], scratch: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "fused_distill.cli", "serve-teacher", str(teacher), "--dtype", "float32"]
    with running(command, scratch / "log") as server:
        for name, own in RUNS.items():
            source = f"url={server.url}" if "served" in name else f"model={teacher}"
            where = [f"teacher={{{source.replace('=', ': ', 1)}}}", f"output={scratch / name}"]
            train(load_config(ROOT / "examples" / "demo.yaml", [*where, *overrides, *own]))
            for line in (scratch / name / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                found.append({"run": name, **{k: row[k] for k in ("step", "kind", *METRICS)}})
    return found


def apart(rows: list[dict[str, Any]]) -> float:
    """The largest relative difference between the losses of the local run and of that with hidden states."""
    losses = [
        [row["loss"] for row in rows if row["run"] == name]
        for name in ("beta 0, local teacher", "beta 0, served hidden states")
    ]
    return max(abs(a - b) / a for a, b in zip(*losses, strict=True))


def plot(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "top1_agreement": "top-1 agreement"}
    axes = figure.subplots(2, 2)
    for one, (metric, title) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(RUNS):
            points = [r for r in content["rows"] if r["run"] == name and r["kind"] == "evaluation"]
            style = "--" if "served" in name else "-"
            one.plot(
                [r["step"] for r in points], [r[metric] for r in points], style, color=f"C{i}", label=name
            )
        one.set_title(f"{title}, held-out prompts, the student writes", fontsize=9, loc="left")
        one.set_xlabel("optimizer step", fontsize=8)
        one.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="local path; default: Gemma 3 270M from PyPI")
    parser.add_argument("--output", type=Path, default=results_folder(False) / "distillation.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of examples/demo.yaml")
    arguments = parser.parse_args()
    teacher = arguments.teacher or demo.packaged_gemma()
    with TemporaryDirectory() as scratch:
        found = rows(teacher, arguments.overrides, Path(scratch))
    command = f"python bench/distillation.py {' '.join(sys.argv[1:])}".strip()
    content = {**header(command), "local_and_hidden_states_apart": apart(found), "rows": found}
    write_json(arguments.output, content)
    plot(content, arguments.output.with_suffix(".png"))
    print(arguments.output, f"{content['local_and_hidden_states_apart']:.1e} apart")


if __name__ == "__main__":
    main()
