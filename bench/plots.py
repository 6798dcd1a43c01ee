"""The figure of bench/scaling.py: how cost grows with tokens, vocabulary, workspace and threads."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

GRAY = "#808080"  # readable on white and on black
Row = dict[str, Any]
SWEEPS = {  # column: axis label
    "tokens": "tokens N",
    "vocab": "vocabulary V",
    "workspace_bytes": "workspace_bytes, MiB",
    "threads": "threads",
}


def scaling_points(rows: list[Row], sweep: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return (x, seconds, GiB without gradients) of a sweep by provider, in order of x."""
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    swept = [row for row in rows if row["sweep"] == sweep and row.get("seconds")]
    everywhere = {row[sweep] for row in swept} - {None}
    for row in swept:
        extra = row.get("extra_bytes")
        memory = None if extra is None else max(extra - row["gradient_bytes"], 0) / 2**30
        # The products alone have no workspace, and are the same beside every one.
        for value in everywhere if row[sweep] is None else (row[sweep],):
            x = value / 2**20 if sweep == "workspace_bytes" else value
            points.setdefault(row["provider"], []).append((x, statistics.median(row["seconds"]), memory))
    return {provider: sorted(values) for provider, values in points.items()}


def scaling_figure(rows: list[Row], path: Path) -> None:
    """Draw time and memory of each sweep as small multiples, for light and dark pages."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "fused-distill", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), squeeze=False)
    for column, (sweep, label) in enumerate(SWEEPS.items()):
        time, memory = axes[0][column], axes[1][column]
        xs: list[float] = []
        for provider, points in scaling_points(rows, sweep).items():
            xs = [x for x, _, _ in points]
            color = "C0" if provider == "fused-distill" else GRAY
            name = provider if provider == "fused-distill" else "products alone"
            time.plot(xs, [seconds for _, seconds, _ in points], "o-", color=color, label=name, markersize=3)
            used = [gib for _, _, gib in points if gib is not None]
            if len(used) == len(xs):
                memory.plot(xs, used, "o-", color=color, markersize=3)
        for panel in (time, memory):
            panel.set_visible(bool(xs))
            panel.set_xscale("log", base=2)
            panel.set_xticks(xs, [f"{x:g}" for x in xs], rotation=45, fontsize=7)
            panel.minorticks_off()
            panel.grid(color=GRAY, alpha=0.3)
            for side in panel.spines.values():
                side.set_color(GRAY)
        if xs:
            time.set_yscale("log")
        memory.set_ylim(bottom=0)
        for panel in (time, memory):
            panel.tick_params(which="both", colors=GRAY, labelsize=7)
        memory.set_xlabel(label, color=GRAY, fontsize=8)
    axes[0][0].set_ylabel("seconds a step", color=GRAY, fontsize=8)
    axes[1][0].set_ylabel("GiB without gradients", color=GRAY, fontsize=8)
    axes[0][0].legend(labelcolor=GRAY, framealpha=0, fontsize=7)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
