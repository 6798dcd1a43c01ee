"""Shared by cpu.py and gpu.py: workers behind pytest-benchmark, and result files saved after each row."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cpuinfo
import pytest
import torch
from providers import Case
from worker import ProviderFailed, Worker

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("fused-distill", "torch", "triton", "liger-kernel", "trl", "transformers")
OUTPUT, SMALL = "FUSED_DISTILL_BENCH_OUTPUT", "FUSED_DISTILL_BENCH_SMALL"


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    description: dict[str, Any] = {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        description |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return description


def commit() -> str:
    """Return the commit, with "+" if files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "python", "kernels", "bench/*.py", "constraints.txt")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def header(command: str) -> dict[str, Any]:
    """Return what is needed to reproduce a result: command, date, commit, machine, versions."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def results_folder(small: bool) -> Path:
    """Return the folder for results; those of `--small` are kept apart from measurements."""
    return ROOT / "outputs" / "bench" if small else RESULTS


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    scratch.replace(path)


@dataclass
class Suite:
    """Measures providers on cases and saves the result file after each row."""

    path: Path
    content: dict[str, Any]
    worker: Worker | None = None
    worker_for: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, benchmark: Any, provider: str, case: Case, rounds: int) -> None:
        """Add one row: times by pytest-benchmark, or the reason why there are none."""
        row: dict[str, Any] = {"provider": provider, **asdict(case)}
        try:
            worker = self._worker(provider)
            answer = worker.prepare(case)
            benchmark._timer = lambda: worker.clock  # the child's time excludes the pipe
            benchmark.pedantic(worker.step, rounds=rounds)
            row |= {"seconds": list(benchmark.stats.stats.data), **answer}
        except ProviderFailed as failure:
            self.close()
            row["error"] = str(failure)
        self.rows.append(row)
        write_json(self.path, {**self.content, "rows": self.rows})
        if "error" in row:
            pytest.skip(row["error"])

    def _worker(self, provider: str) -> Worker:
        if self.worker is None or self.worker_for != provider:
            self.close()
            self.worker, self.worker_for = Worker(provider), provider
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    """Provide the suite to the benchmark modules, which import this fixture."""
    running = Suite(Path(os.environ[OUTPUT]), header(os.environ["FUSED_DISTILL_BENCH_COMMAND"]))
    yield running
    running.close()


def main(script: str, device: str) -> int:
    """Run a benchmark script under pytest, then plot what it measured.

    Other arguments are passed to pytest, e.g. -k "fused or floor" to run some of the rows.
    """
    parser = argparse.ArgumentParser(
        description=f"{script}: JSON and a plot in bench/results/", epilog=main.__doc__
    )
    parser.add_argument("--output", type=Path, help="result file (default: named after the device)")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, to check the code paths on any machine"
    )
    arguments, others = parser.parse_known_args()
    if device == "cuda" and not arguments.small and not torch.cuda.is_available():
        parser.error("no GPU found; use --small to run tiny sizes on the CPU")
    name = (
        machine().get("gpu") if device == "cuda" else f"{machine()['cpu']} {torch.get_num_threads()} threads"
    )
    slug = re.sub(r"[^a-z0-9]+", "-", f"{Path(script).stem} {name or 'small'}".lower()).strip("-")
    output = (arguments.output or results_folder(arguments.small) / f"{slug}.json").resolve()
    os.environ[OUTPUT] = str(output)
    os.environ["FUSED_DISTILL_BENCH_COMMAND"] = (
        f"python bench/{Path(script).name} {' '.join(sys.argv[1:])}".strip()
    )
    if arguments.small:
        os.environ[SMALL] = "1"
    columns = "--benchmark-columns=min,median,max,rounds"
    status = pytest.main([script, "-p", "no:cacheprovider", "-rs", columns, "--benchmark-sort=name", *others])
    if output.exists():
        from report import plot

        plot(output)
        print(f"{output}\n{output.with_suffix('.png')}")
    return int(status)
