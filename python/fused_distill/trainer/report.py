"""report.html: a run on one page without scripts and without files from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .atomic import write_whole
from .charts import Series, line_chart, stacked_chart
from .config import TrainConfig, flat_settings

Row = dict[str, Any]  # a line of metrics.jsonl

PHASES = {
    "rollout_seconds": "rollouts",
    "teacher_seconds": "teacher",
    "update_seconds": "student: forward, backward, optimizer",
}
POLICIES = {"on_policy": "on-policy", "off_policy": "off-policy"}
TITLES = {
    "loss": "Loss (nats per token)",
    "full_loss": "Loss against the teacher's whole distribution (nats per token)",
    "forward_kl": "Forward KL, KL(teacher || student) (nats per token)",
    "reverse_kl": "Reverse KL, KL(student || teacher) (nats per token)",
    "student_entropy": "Entropy of the student (nats per token)",
    "teacher_entropy": "Entropy of the teacher (nats per token)",
    "top1_agreement": "Tokens where both have the same most likely token (fraction)",
    "student_mass": "Student's probability of the top-k tokens",
    "teacher_mass": "Teacher's probability of the top-k tokens",
    "completion_length": "Length of a completion (tokens)",
    "truncated": "Completions cut at the length limit (fraction)",
    "grad_norm": "Norm of the gradient before clipping",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Speed (completion tokens per second)",
    "memory_gib": "Peak memory (GiB)",
}
SHOWN_BEFORE_AND_AFTER = (*TITLES,)[: [*TITLES].index("grad_norm")]
_PREFIXES = {"topk_": " over the top-k outcomes", "sampled_": ", estimated from the sampled tokens"}
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1c1c1c;--soft:#5d5d5d;--edge:#dcdcdc;--panel:#f6f6f6;
--c1:#1f6fc4;--c2:#d9621e;--c3:#1a8f6b;--c4:#9650b8;--c5:#a57c00;--c6:#c23b5e}
@media (prefers-color-scheme:dark){:root{--page:#16181b;--text:#e9e9e9;--soft:#a5a9ae;--edge:#3a3e44;
--panel:#1f2226;--c1:#6aaef5;--c2:#f29355;--c3:#4cc79d;--c4:#c48be0;--c5:#d9b23a;--c6:#ef7f9d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:90rem;padding:1rem;background:var(--page);color:var(--text);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin:2rem 0 .6rem}
table{border-collapse:collapse}th,td{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--edge)}th{font-weight:500;color:var(--soft);min-width:9rem}
td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.grid-of{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
figure{margin:0;min-width:0}figcaption{font-weight:500}svg{display:block;height:auto;max-width:100%}
svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--edge)}
.line,.raw{fill:none!important;stroke-linecap:round;stroke-linejoin:round}.line{stroke-width:2}
.raw{stroke-width:1;opacity:.35}.area{stroke:none!important;opacity:.8}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
.sample{margin:0 0 1rem;padding:.6rem .8rem;background:var(--panel);border:1px solid var(--edge)}
pre{margin:.2rem 0;white-space:pre-wrap;font:.9rem/1.4 ui-monospace,monospace}.prompt{color:var(--soft)}
.warning{padding:.6rem .8rem;border-left:4px solid var(--c2);background:var(--panel)}
""" + "".join(
    f".c{i}{{stroke:var(--c{i});fill:var(--c{i})}}.legend .c{i}{{background:var(--c{i})}}"
    for i in range(1, 7)
)


def write_report(config: TrainConfig, rows: Sequence[Row], warnings: Sequence[str] = ()) -> None:
    """Write report.html to the output folder; it appears complete or not at all.

    Args:
        config: the settings of the run.
        rows: the lines of metrics.jsonl so far.
        warnings: shown at the top.
    """
    write_whole(config.output / "report.html", render(config, rows, warnings))


def render(config: TrainConfig, rows: Sequence[Row], warnings: Sequence[str] = ()) -> str:
    """Return the page, see `write_report`."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    title = f"Distillation of {Path(config.student).name}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        _summary(config, rows, evaluations),
        f'<h2>Curves</h2><div class="grid-of">{"".join(_charts(rows))}</div>' if rows else "",
        _samples(evaluations),
        f"<h2>All settings</h2><details><summary>Show</summary>{_table(flat_settings(config))}</details>",
        "</body></html>",
    ]
    return "".join(parts)


def before_and_after(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Return names and values of the metrics of the first and the last evaluation."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    return [
        (name, first[name], last[name])
        for name in first
        if name in last and _split(name)[1] in SHOWN_BEFORE_AND_AFTER
    ]


def phase_seconds(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds that a run spent in each phase of its steps, and in evaluations."""
    names = PHASES | {"evaluation_seconds": "evaluations"}
    return {label: sum(row.get(name, 0.0) for row in rows) for name, label in names.items()}


def describe(name: str) -> str:
    """Return what a metric is, for a reader who does not know its name."""
    group, metric, addition = _split(name)
    title = TITLES.get(metric, metric) + addition
    return f"{group}: {title}" if group else title


def _split(name: str) -> tuple[str, str, str]:
    """Return a metric's teacher or policy, its name without prefix, and what the prefix says."""
    group, _, metric = name.rpartition("/")
    prefix = next(filter(metric.startswith, _PREFIXES), "")
    return group, metric.removeprefix(prefix), _PREFIXES.get(prefix, "")


def _summary(config: TrainConfig, rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    changed = flat_settings(config, changed=True)
    step = max((row["step"] for row in rows), default=0)
    teachers = {k: v for k, v in changed.items() if k.partition(".")[0] in ("teacher", "teachers")}
    facts: dict[str, Any] = {
        "student": config.student,
        **teachers,
        "progress": f"{step} of {config.steps} steps",
    }
    others = {name: value for name, value in changed.items() if name not in facts and name != "steps"}
    compared = "".join(
        f'<tr><td>{escape(describe(name))}</td><td class="number">{before:.4g}</td>'
        f'<td class="number">{after:.4g}</td></tr>'
        for name, before, after in before_and_after(rows)
    )
    if compared:
        steps = (f'<td class="number">step {row["step"]}</td>' for row in (evaluations[0], evaluations[-1]))
        compared = f"<table><tr><th>held-out prompts</th>{''.join(steps)}</tr>{compared}</table>"
    return (
        f'<div class="grid-of"><div><h2>Run</h2>{_table(facts)}</div>'
        f"<div><h2>Before and after</h2>{compared or 'There was no evaluation.'}</div>"
        f"<div><h2>Settings that differ from the defaults</h2>{_table(others)}</div></div>"
    )


def _table(values: Mapping[str, Any]) -> str:
    cells: list[str] = []
    for name, value in values.items():
        key = escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")
        cells.append(f"<tr><th>{key}</th><td>{escape(str(value))}</td></tr>")
    return f"<table>{''.join(cells)}</table>"


def _charts(rows: Sequence[Row]) -> list[str]:
    """Return a chart of each metric, with a curve for each policy, each teacher, and the evaluations."""
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    found = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    charts: list[str] = []
    for name in dict.fromkeys(name.rpartition("/")[2] for name in found):
        if _split(name)[1] not in TITLES:
            continue
        groups = [n.rpartition("/")[0] for n in found if n.rpartition("/")[2] == name]
        policies = [group for group in POLICIES if group in groups]
        groups = policies + [group for group in groups if group not in POLICIES]
        series: list[Series] = []
        for group in groups:
            key = f"{group}/{name}" if group else name
            label = POLICIES.get(group, group)
            if group or not policies:  # the mean of both policies would hide them
                series.append(Series(label or "training", _points(trained, key)))
            if group not in POLICIES:
                label = f"held-out prompts, {group}" if group else "held-out prompts"
                series.append(Series(label, _points(evaluated, key), dots=True))
        charts.append(line_chart(describe(name), series))
    phases = [Series(label, _points(trained, name)) for name, label in PHASES.items()]
    return [*charts, stacked_chart("Time of a step by phase (seconds)", phases)]


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _samples(evaluations: Sequence[Row]) -> str:
    sampled = [row for row in evaluations if row.get("samples")]
    if not sampled:
        return ""
    compared = [sampled[0]] if len(sampled) == 1 else [sampled[0], sampled[-1]]
    parts = ["<h2>Completions of held-out prompts, first and last evaluation</h2>"]
    for samples in zip(*(row["samples"] for row in compared), strict=False):
        completions = (
            f"<div><b>step {row['step']}</b><pre>{escape(sample['completion'])}</pre></div>"
            for row, sample in zip(compared, samples, strict=True)
        )
        prompt = f'<pre class="prompt">{escape(samples[0]["prompt"])}</pre>'
        parts.append(f'<div class="sample">{prompt}<div class="grid-of">{"".join(completions)}</div></div>')
    return "".join(parts)
