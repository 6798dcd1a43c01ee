"""Tables and figures follow from the result files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from cases import INTERPRETED
from plots import scaling_figure

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


def result_file(folder: Path) -> Path:
    shape = {
        "tokens": 8,
        "vocab": 9,
        "student_dim": 2,
        "teacher_dim": 3,
        "dtype": "float32",
        "beta": 0.5,
        "k": 0,
    }
    rows = [
        {"provider": "floor", **shape, "seconds": [2.0, 4.0, 3.0]},
        {"provider": "naive", **shape, "seconds": [6.0], "extra_bytes": 2**30, "gradient_bytes": 2**29},
        {"provider": "TRL", **shape, "error": "OutOfMemoryError: no memory"},
    ]
    machine = {"cpu": "a CPU", "threads": 2}
    content = {
        "command": "c",
        "date": "2026-01-02",
        "commit": "abc",
        "machine": machine,
        "versions": {},
        "rows": rows,
    }
    path = folder / "some.json"
    path.write_text(json.dumps(content))
    return path


def test_tables_are_inserted_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result_file(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.with_tables("before\n<!-- bench:some -->\nstale\n<!-- /bench -->\nafter\n")
    assert text.startswith("before\n<!-- bench:some -->\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "stale" not in text
    assert "| naive | 0.5 | 6.00 s (6.00 s to 6.00 s) | 2.00 | 2.16e-07 |  | 1.00 | 0.50 |" in text
    assert "| TRL, without its Triton kernels | 0.5 | OutOfMemoryError: no memory | | | | | |" in text
    assert report.with_tables(text) == text


def test_a_summary_is_of_the_first_shape_at_beta_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = result_file(tmp_path)
    content = json.loads(path.read_text())
    floor = content["rows"][0]
    content["rows"] += [{**floor, "provider": "naive", "beta": 0.0}, {**floor, "provider": "x", "vocab": 7}]
    content["rows"].append({**floor, "provider": "y", "k": 4})
    path.write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.with_tables("<!-- bench:some#summary -->\n<!-- /bench -->\n")
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names == ["", "the four products alone (torch.mm)", "naive", "TRL, without its Triton kernels"]


def test_a_summary_says_how_far_apart_times_are() -> None:
    rows = [
        {"provider": "fused-distill", "seconds": [1.0, 1.1, 1.0]},
        {"provider": "naive", "seconds": [2.0, 3.0, 2.0, 2.0]},
        {"provider": "TRL", "error": "OutOfMemoryError: no memory"},
    ]
    assert report.spread_text(rows) == (
        "Times are medians of 3 to 4 steps. Those of fused-distill differ by 10%, "
        "and those of naive, which differ most, by 50%."
    )


def test_check_reports_stale_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result_file(tmp_path)
    document = tmp_path / "README.md"
    document.write_text("<!-- bench:some -->\n<!-- /bench -->\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 1
    assert document.read_text() == "<!-- bench:some -->\n<!-- /bench -->\n"
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 0
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0


def test_the_documents_show_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "report.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def run_of(date: str, provider: str, **columns: Any) -> dict[str, Any]:
    shape = dict.fromkeys(("tokens", "vocab", "student_dim", "teacher_dim"), 1000)
    row = {"provider": provider, **shape, "k": 0, "beta": 0.5, "dtype": "float32", "seconds": [2.0]}
    machine = {"cpu": "a CPU", "threads": 2}
    run = {"command": "c", "date": date, "commit": "abc", "machine": machine, "versions": {}, "part": "full"}
    return {**run, "complete": True, "rows": [row], **columns}


def tables_of(folder: Path, monkeypatch: pytest.MonkeyPatch, mark: str, **files: list[dict[str, Any]]) -> str:
    for name, runs in files.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(report, "RESULTS", folder)
    return report.with_tables(f"<!-- bench:{mark} -->\n<!-- /bench -->\n")


def test_the_newest_complete_run_of_a_part_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [run_of("2026-01-01", "old"), run_of("2026-01-03", "partial", complete=False)]
    second = [run_of("2026-01-02", "new"), run_of("2026-01-04", "other part", part="pairs")]
    text = tables_of(tmp_path, monkeypatch, "cpu#full", cpu_first=first, cpu_second=second)
    assert "| new | 0.5 |" in text
    assert not any(name in text for name in ("old", "partial", "other part"))
    assert "| other part | 0.5 |" in tables_of(tmp_path, monkeypatch, "cpu#pairs")


def test_a_part_without_a_run_is_not_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables_of(tmp_path, monkeypatch, "cpu#topk", cpu_first=[run_of("2026-01-01", "naive")])
    assert text == "<!-- bench:cpu#topk -->\n\nNot measured yet.\n<!-- /bench -->\n"


def test_ratios_are_to_the_floor_by_the_same_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("2026-01-01", "floor")
    (row,) = run["rows"]
    run["peak"] = {"torch.mm": 16e9, "oneDNN": 32e9}
    run["rows"] = [
        {**row, "product": "oneDNN", "seconds": [1.0]},
        {**row, "provider": "fused-distill", "product": "oneDNN", "seconds": [1.25]},
        {**row, "product": "torch.mm", "seconds": [2.0]},
        {**row, "provider": "fused-distill", "product": "torch.mm", "seconds": [2.25, 2.0, 4.0]},
        {**row, "provider": "naive", "product": "torch.mm", "seconds": [4.0]},
    ]
    text = tables_of(tmp_path, monkeypatch, "cpu#full", cpu_first=[run])
    rows = [line.split(" | ")[:6] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        ["| the four products alone (oneDNN)", "", "1.00 s (1.00 s to 1.00 s)", "1.00", "8", "25%"],
        ["| fused-distill (oneDNN)", "0.5", "1.25 s (1.25 s to 1.25 s)", "1.25", "6.4", "20%"],
        ["| the four products alone (torch.mm)", "", "2.00 s (2.00 s to 2.00 s)", "1.00", "4", "12%"],
        ["| fused-distill (torch.mm)", "0.5", "2.25 s (2.00 s to 4.00 s)", "1.12", "3.56", "11%"],
        ["| naive", "0.5", "4.00 s (4.00 s to 4.00 s)", "2.00", "2", "6%"],
    ]


def test_a_scaling_run_becomes_a_figure_and_a_table(tmp_path: Path) -> None:
    (row,) = run_of("2026-01-01", "fused-distill", extra_bytes=2**31, gradient_bytes=2**30)["rows"]
    row |= {"threads": 2, "workspace_bytes": None, "extra_bytes": 2**31, "gradient_bytes": 2**30}
    rows: list[dict[str, Any]] = []
    for sweep, values in (("tokens", (8, 16)), ("workspace_bytes", (2**20, 2**21)), ("threads", (1, 2))):
        rows += [{**row, "sweep": sweep, sweep: value} for value in values]
    rows.append({**row, "sweep": "workspace_bytes", "provider": "floor", "seconds": [1.0]})
    lines = report.scaling_table({"rows": rows}).splitlines()
    assert "| tokens N | 8 | 2.00 s |  | 1.00 |" in lines
    assert "| workspace_bytes, MiB | 2 | 2.00 s | 1.00 s | 1.00 |" in lines
    for name in ("first.svg", "second.svg"):
        scaling_figure(rows, tmp_path / name)
    assert "<svg" in (tmp_path / "first.svg").read_text()
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
