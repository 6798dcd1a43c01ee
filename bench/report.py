"""Turn result files into the tables of README.md and docs/, and into plots.

    python bench/report.py            rewrite every table between <!-- bench:FILE --> and <!-- /bench -->
    python bench/report.py --check    report tables that differ from their result files (exit status 1)

FILE is the name of a result file in bench/results/, without .json. FILE#full and FILE#topk select the rows
with a full-vocabulary and with a top-k teacher, FILE#summary those of the first shape at beta 0.5, and
kernel-costs#predicted the times that a model predicts from the kernel costs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from kernel_report import cost_tables, predicted_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{page}.md"
        for page in ("benchmarks", "numerics", "performance", "serving", "training")
    ),
)
MARKED = re.compile(
    r"(<!-- bench:(\S+?)(?:#(full|topk|summary|predicted))? -->\n).*?(<!-- /bench -->)", re.DOTALL
)
SHAPE = ("tokens", "vocab", "student_dim", "teacher_dim", "k", "dtype")

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def shape_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in SHAPE)


def shapes(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Return the distinct shapes, in the order of measurement."""
    return list(dict.fromkeys(map(shape_of, rows)))


def floor_seconds(rows: list[Row], shape: tuple[Any, ...]) -> float | None:
    for row in rows:
        if row["provider"] == "floor" and shape_of(row) == shape and "seconds" in row:
            return statistics.median(row["seconds"])
    return None


def shape_text(shape: tuple[Any, ...]) -> str:
    tokens, vocab, student_dim, teacher_dim, k, dtype = shape
    teacher = f"K {k}" if k else f"Dt {teacher_dim}"
    return f"N {tokens}, V {vocab}, Ds {student_dim}, {teacher}, {dtype}"


def products_of(shape: tuple[Any, ...]) -> str:
    return "three products" if shape[SHAPE.index("k")] else "four products"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def gib_text(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def times_table(content: dict[str, Any]) -> str:
    """Return one row per provider, shape and beta: median time, its ratio to the floor, peak memory."""
    rows = content["rows"]
    lines: list[str] = []
    for shape in shapes(rows):
        floor, products = floor_seconds(rows, shape), products_of(shape)
        lines += [
            f"{shape_text(shape)}:",
            "",
            f"| | beta | time | relative to {products} (torch.mm) "
            "| peak memory, GiB | without gradients, GiB |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if shape_of(row) != shape:
                continue
            name, beta = row["provider"], f"{row['beta']:g}"
            if name == "floor":
                name, beta = f"the {products} alone (torch.mm)", ""
            if name == "TRL" and "gpu" not in content["machine"]:
                name = "TRL, without its Triton kernels"
            if "error" in row:
                lines.append(f"| {name} | {beta} | {row['error']} | | | |")
                continue
            seconds = statistics.median(row["seconds"])
            ratio = "" if floor is None else f"{seconds / floor:.2f}"
            extra, gradients = row.get("extra_bytes"), row.get("gradient_bytes")
            memory = (extra, None if extra is None else max(extra - gradients, 0))
            cells = [name, beta, seconds_text(seconds), ratio, *map(gib_text, memory)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def errors_table(content: dict[str, Any]) -> str:
    """Return relative errors against float64: one line per case, one column per provider."""
    lines: list[str] = []
    for title in dict.fromkeys(row["table"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["table"] == title]
        providers = list(dict.fromkeys(row["provider"] for row in rows))
        lines += [f"{title}:", "", f"| | {' | '.join(providers)} |", "|---" * (len(providers) + 1) + "|"]
        for case in dict.fromkeys(row["case"] for row in rows):
            by_provider = {row["provider"]: row for row in rows if row["case"] == case}
            cells = [
                by_provider[name].get("text") or f"{by_provider[name]['error']:.0e}" for name in providers
            ]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def runs_table(content: dict[str, Any]) -> str:
    """Return the evaluations of distillation runs: once before, and at the end of each."""
    rows = content["rows"]
    ends = [row for row in rows if row["kind"] not in ("train", "evaluation")]
    lines = ["| beta | teacher | forward KL | reverse KL | top-1 agreement |", "|---|---|---|---|---|"]
    for beta, teacher, row in [("", "before", rows[0]), *((f"{r['beta']:g}", r["teacher"], r) for r in ends)]:
        numbers = (f"{row[name]:.2f}" for name in ("forward_kl", "reverse_kl", "top1_agreement"))
        lines.append(f"| {' | '.join((beta, teacher, *numbers))} |")
    return "\n".join([*lines, ""])


def counted(content: dict[str, Any]) -> bool:
    """Return whether a result file holds kernel costs, which are counted, and not measurements."""
    return "target" in content["rows"][0]


_TABLES = {"table": errors_table, "teacher": runs_table}  # by a column of the rows


def provenance(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    if counted(content):
        device = "Compiled without a GPU"
    packages = ", ".join(
        f"{name} {number}" for name, number in versions.items() if number and name != "fused-distill"
    )
    return (
        f"{device}; {packages}; `{content['command']}`, commit {content['commit']}, {content['date'][:10]}. "
        + content.get("note", "")
    ).strip()


def table(content: dict[str, Any], part: str | None = None) -> str:
    if counted(content):
        body = predicted_table(content) if part == "predicted" else cost_tables(content)
        return f"\n{body}\n{provenance(content)}\n"
    if part is not None:
        rows = [row for row in content["rows"] if bool(row["k"]) == (part == "topk")]
        if part == "summary":
            rows = [row for row in rows if row["beta"] == 0.5 and shape_of(row) == shape_of(rows[0])]
        content = {**content, "rows": rows}
    make = next((f for key, f in _TABLES.items() if key in content["rows"][0]), times_table)
    body = make(content)
    if part == "summary":
        body += f"\n{spread_text(content['rows'])}\n"
    return f"\n{body}\n{provenance(content)}\n"


def spread_text(rows: list[Row]) -> str:
    """Return how far apart the times of one row are, in the row where they differ most."""
    times = [row["seconds"] for row in rows if "seconds" in row]
    spread = max(((max(t) - min(t)) / statistics.median(t) for t in times), default=0)
    return f"Times are medians of {max(map(len, times), default=0)}, which differ by {spread:.0%} at most."


def plot(path: Path) -> None:
    """Plot time and memory per shape and beta: those measured for peers too, or all if there are none."""
    from matplotlib.figure import Figure

    rows = [row for row in load(path)["rows"] if "seconds" in row]
    measured = [
        (shape, beta)
        for shape in shapes(rows)
        for beta in dict.fromkeys(row["beta"] for row in rows if row["provider"] != "floor")
        if any(_in_panel(row, shape, beta) for row in rows)
    ]
    peers = [row for row in rows if not _is_ours(row)]
    panels = [panel for panel in measured if any(_in_panel(row, *panel) for row in peers)] or measured
    figure = Figure(figsize=(9, 0.8 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), (shape, beta) in zip(axes, panels, strict=True):
        shown = [row for row in rows if _in_panel(row, shape, beta)][::-1]
        names = [row["provider"] for row in shown]
        colors = ["C0" if _is_ours(row) else "0.7" for row in shown]
        left.barh(names, [statistics.median(row["seconds"]) for row in shown], color=colors)
        floor = floor_seconds(rows, shape)
        if floor is not None:
            left.axvline(floor, color="k", linewidth=0.8, linestyle="--")
        left.set_xlabel(f"seconds, forward and backward (dashed: the {products_of(shape)})")
        left.set_title(f"{shape_text(shape)}, beta {beta:g}", fontsize=9, loc="left")
        right.barh(names, [(row.get("extra_bytes") or 0) / 2**30 for row in shown], color=colors)
        right.set_xlabel("peak memory with gradients, GiB")
        right.set_yticklabels([])
        for panel in (left, right):
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
            panel.xaxis.label.set_size(8)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def _is_ours(row: Row) -> bool:
    return row["provider"].startswith("fused-distill")


def _in_panel(row: Row, shape: tuple[Any, ...], beta: float) -> bool:
    same = row["provider"] != "floor" and row["beta"] == beta
    return same and shape_of(row) == shape


def with_tables(text: str) -> str:
    """Return the text with every marked table regenerated from its result file."""
    return MARKED.sub(lambda m: m[1] + table(load(RESULTS / f"{m[2]}.json"), m[3]) + m[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change no file; exit status 1 if a table is stale"
    )
    check = parser.parse_args().check
    stale = False
    for document in DOCUMENTS:
        text = document.read_text()
        new = with_tables(text)
        if new == text:
            continue
        stale = True
        print(f"{document.name}: {'differs from its result files' if check else 'rewritten'}")
        if not check:
            document.write_text(new)
    return int(stale and check)


if __name__ == "__main__":
    raise SystemExit(main())
