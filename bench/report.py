"""Turn result files into the tables of README.md and docs/, and into the figure of docs/benchmarks.md.

    python bench/report.py            rewrite every table between <!-- bench:FILE --> and <!-- /bench -->
    python bench/report.py --check    report tables that differ from their result files (exit status 1)

FILE is the name of a result file in bench/results/, without .json, or the first word of several, of which the
newest run counts: "cpu" means cpu-DEVICE.json of every device. FILE#full, FILE#topk and FILE#pairs select
runs with a full-vocabulary teacher, a top-k teacher and pairs of real models, FILE#summary the first shape of
#full at beta 0.5, and kernel-costs#predicted the times that a model predicts from the kernel costs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from kernel_report import cost_tables, predicted_table
from models import names_of
from plots import SWEEPS, scaling_figure, scaling_points

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
    r"(<!-- bench:(\S+?)(?:#(full|topk|pairs|summary|predicted))? -->\n).*?(<!-- /bench -->)", re.DOTALL
)
NOT_MEASURED = "\nNot measured yet.\n"
SHAPE = ("tokens", "vocab", "student_dim", "teacher_dim", "k", "dtype")

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def runs_of(name: str) -> list[dict[str, Any]]:
    """Return the complete runs of the result files that a mark names."""
    exact = RESULTS / f"{name}.json"
    paths = [exact] if exact.exists() else sorted(RESULTS.glob(f"{name}-*.json"))
    contents = [load(path) for path in paths]
    runs = [run for content in contents for run in content.get("runs", [content])]
    return [run for run in runs if run.get("complete", True)]


def newest(runs: list[dict[str, Any]], part: str | None) -> dict[str, Any] | None:
    """Return the newest run of a part, with the rows of that part only; None if there is none."""
    found: list[dict[str, Any]] = []
    for run in runs:
        rows = run["rows"]
        if part in ("full", "topk", "pairs", "summary"):
            full = part in ("full", "summary")
            if run.get("part", "full" if full else "topk") != ("full" if full else part):
                continue
            rows = [row for row in rows if bool(row["k"]) == (part == "topk")]
        if part == "summary":
            rows = [row for row in rows if row["beta"] == 0.5 and shape_of(row) == shape_of(rows[0])]
        if rows:
            found.append({**run, "rows": rows})
    return max(found, key=lambda run: run["date"], default=None)


def shape_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in SHAPE)


def shapes(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Return the distinct shapes, in the order of measurement."""
    return list(dict.fromkeys(map(shape_of, rows)))


def product_of(row: Row) -> str:
    """Return what multiplied the matrices of a row."""
    return row.get("product", "torch.mm")


def floor_seconds(rows: list[Row], row: Row) -> float | None:
    """Return the time of the products alone at a row's shape, by the same library."""
    for other in rows:
        same = shape_of(other) == shape_of(row) and product_of(other) == product_of(row)
        if other["provider"] == "floor" and same and "seconds" in other:
            return statistics.median(other["seconds"])
    return None


def operations(row: Row) -> int | None:
    """Return the operations of a step that every implementation needs; None without full logits."""
    if row["provider"] == "fused-distill, renormalize":
        return None
    return row["tokens"] * row["vocab"] * (6 * row["student_dim"] + 2 * row["teacher_dim"])


def shape_text(shape: tuple[Any, ...]) -> str:
    tokens, vocab, student_dim, teacher_dim, k, dtype = shape
    teacher = f"K {k}" if k else f"Dt {teacher_dim}"
    models = names_of(vocab, student_dim, teacher_dim)
    sizes = f"N {tokens}, V {vocab}, Ds {student_dim}, {teacher}, {dtype}"
    return f"{sizes} ({models})" if models else sizes


def products_of(shape: tuple[Any, ...]) -> str:
    return "three products" if shape[SHAPE.index("k")] else "four products"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def range_text(seconds: list[float]) -> str:
    """Return the median, and the least and the greatest in brackets."""
    low, high = seconds_text(min(seconds)), seconds_text(max(seconds))
    return f"{seconds_text(statistics.median(seconds))} ({low} to {high})"


def gib_text(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def row_name(row: Row, products: set[str], on_gpu: bool) -> str:
    name = row["provider"]
    if name == "floor":
        return f"the {products_of(shape_of(row))} alone ({product_of(row)})"
    if name.startswith("TRL") and not on_gpu and not row["k"]:
        return "TRL, without its Triton kernels"
    return f"{name} ({product_of(row)})" if len(products) > 1 and _is_ours(row) else name


def rate_unit(content: dict[str, Any]) -> tuple[str, float]:
    return ("TFLOP/s", 1e12) if "gpu" in content["machine"] else ("GFLOP/s", 1e9)


def times_table(content: dict[str, Any]) -> str:
    """Return one row per provider, shape and beta: time, its ratio to the floor, rate and peak memory."""
    rows, on_gpu = content["rows"], "gpu" in content["machine"]
    peak = max(content.get("peak", {}).values(), default=None)
    unit, scale = rate_unit(content)
    lines: list[str] = []
    for shape in shapes(rows):
        shown = [row for row in rows if shape_of(row) == shape]
        products = {product_of(row) for row in shown}
        lines += [
            f"{shape_text(shape)}:",
            "",
            f"| | beta | time (range) | relative to the {products_of(shape)} | {unit} | of peak "
            "| peak memory, GiB | without gradients, GiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in shown:
            name = row_name(row, products, on_gpu)
            beta = "" if row["provider"] == "floor" else f"{row['beta']:g}"
            if "error" in row:
                lines.append(f"| {name} | {beta} | {row['error']} | | | | | |")
                continue
            seconds, floor, needed = (
                statistics.median(row["seconds"]),
                floor_seconds(rows, row),
                operations(row),
            )
            ratio = "" if floor is None else f"{seconds / floor:.2f}"
            rate = "" if needed is None else f"{needed / seconds / scale:.3g}"
            share = "" if needed is None or peak is None else f"{needed / seconds / peak:.0%}"
            extra, gradients = row.get("extra_bytes"), row.get("gradient_bytes")
            memory = (extra, None if extra is None else max(extra - gradients, 0))
            cells = [name, beta, range_text(row["seconds"]), ratio, rate, share, *map(gib_text, memory)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def scaling_table(content: dict[str, Any]) -> str:
    """Return the figure of docs/benchmarks.md and the numbers in it."""
    lines = ["![time and memory against tokens, vocabulary, workspace and threads](scaling.svg)", ""]
    lines += ["| | | time | products alone | without gradients, GiB |", "|---|---|---|---|---|"]
    for sweep, label in SWEEPS.items():
        points = scaling_points(content["rows"], sweep)
        floors = {x: seconds for x, seconds, _ in points.get("floor", [])}
        for x, seconds, memory in points.get("fused-distill", []):
            cells = [label, f"{x:g}", seconds_text(seconds), seconds_text(floors[x]) if x in floors else ""]
            lines.append(f"| {' | '.join(cells)} | {'' if memory is None else f'{memory:.2f}'} |")
    return "\n".join([*lines, ""])


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


_TABLES = {"table": errors_table, "teacher": runs_table, "sweep": scaling_table}  # by a column of the rows


def provenance(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    if counted(content):
        device = "Compiled without a GPU"
    packages = ", ".join(
        f"{name} {number}" for name, number in versions.items() if number and name != "fused-distill"
    )
    if content.get("peak"):
        unit, scale = rate_unit(content)
        rates = " and ".join(f"{rate / scale:.3g} {unit} by {name}" for name, rate in content["peak"].items())
        device += f", large products at up to {rates}"
    return (
        f"{device}; {packages}; `{content['command']}`, commit {content['commit']}, {content['date'][:10]}. "
        + content.get("note", "")
    ).strip()


def table(content: dict[str, Any], part: str | None = None) -> str:
    if counted(content):
        body = predicted_table(content) if part == "predicted" else cost_tables(content)
        return f"\n{body}\n{provenance(content)}\n"
    make = next((f for key, f in _TABLES.items() if key in content["rows"][0]), times_table)
    body = make(content)
    if part == "summary":
        body += f"\n{spread_text(content['rows'])}\n"
    return f"\n{body}\n{provenance(content)}\n"


def spread_text(rows: list[Row]) -> str:
    """Return how far apart the times of our row are, and those of the row where they differ most."""
    times = [(row["provider"], row["seconds"]) for row in rows if "seconds" in row]
    counts = sorted({len(seconds) for _, seconds in times}) or [0]
    steps = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spreads = [((max(t) - min(t)) / statistics.median(t), name) for name, t in times]
    ours = max((spread for spread, name in spreads if name == "fused-distill"), default=0)
    greatest, most = max(spreads, default=(0, "none"))
    return (
        f"Times are medians of {steps} steps. Those of fused-distill differ by {ours:.0%}, "
        f"and those of {most}, which differ most, by {greatest:.0%}."
    )


def _is_ours(row: Row) -> bool:
    return row["provider"].startswith("fused-distill")


def with_tables(text: str) -> str:
    """Return the text with every marked table regenerated from its result file."""

    def replacement(mark: re.Match[str]) -> str:
        run = newest(runs_of(mark[2]), mark[3])
        return f"{mark[1]}{NOT_MEASURED if run is None else table(run, mark[3])}{mark[4]}"

    return MARKED.sub(replacement, text)


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
    scaling = newest(runs_of("scaling"), None)
    if scaling is not None and not check:
        scaling_figure(scaling["rows"], ROOT / "docs" / "scaling.svg")
    return int(stale and check)


if __name__ == "__main__":
    raise SystemExit(main())
