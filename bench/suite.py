"""Shared by the benchmarks: rows that take turns, each in its provider's process; growing result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import torch
from providers import Case, Product
from worker import ProviderFailed, Worker

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("fused-distill", "torch", "triton", "liger-kernel", "trl", "transformers")
TABLES = ("report", "plots", "kernel_report")  # modules that only show results
# Files that decide results, as git's path specifications.
MEASURED = ("python", "kernels", "bench/*.py", "constraints.txt", *(f":!bench/{name}.py" for name in TABLES))
PRODUCT_VARIABLE = "FUSED_DISTILL_CPU_PRODUCT"


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


def command() -> str:
    """Return the command that runs this process's script, with paths inside the project relative to it."""
    arguments = [argument.replace(f"{ROOT}{os.sep}", "") for argument in sys.argv[1:]]
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *arguments])


def commit() -> str:
    """Return the newest commit that changed what is measured, with "+" if files differ from it.

    Commits that change only results or documentation do not count, so that results between them agree.
    """

    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", *MEASURED)
    return git("log", "-1", "--format=%h", "--abbrev=12", "--", *MEASURED) + ("+" if changed else "")


def header() -> dict[str, Any]:
    """Return what is needed to reproduce a result: command, date, commit, machine, versions."""
    return {
        "command": command(),
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


class Planned(NamedTuple):
    """One row of a result table: what is measured, on which inputs, with which matrix products."""

    provider: str
    case: Case
    product: Product = "torch.mm"
    setting: str = ""  # a name in Suite.environments

    @property
    def label(self) -> str:
        words = (self.provider, f"({self.product})", self.case.label, self.setting)
        return " ".join(filter(None, words))

    @property
    def process(self) -> tuple[str, str, str]:
        """Rows with the same value are measured by the same process."""
        return self.provider, self.product, self.setting


@dataclass
class Rounds:
    """How often a step is repeated: until it took `seconds` in all, within these numbers of repetitions."""

    seconds: float = 6.0
    at_least: int = 4
    at_most: int = 8

    def enough(self, times: list[float]) -> bool:
        return len(times) >= self.at_most or (len(times) >= self.at_least and sum(times) >= self.seconds)


@dataclass
class Suite:
    """Measures groups of rows, and saves the run after each round.

    The rows of a group take turns: round by round, so that a machine that becomes slower does so for all.
    They have the same shape, and share one copy of the inputs on a CPU.
    """

    save: Callable[[dict[str, Any]], None]
    run: dict[str, Any]
    rounds: Rounds = field(default_factory=Rounds)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)  # variables of each setting
    workers: dict[tuple[str, str, str], Worker] = field(default_factory=dict)

    def measure(self, group: list[Planned]) -> list[dict[str, Any]]:
        """Add the rows of a group to the run, and return them: times and memory, or why there are none."""
        for process in self.workers.keys() - {planned.process for planned in group}:
            self.workers.pop(process).close()
        for worker in self.workers.values():
            worker.reset()
        rows = [self._row(planned) for planned in group]
        with shared_inputs(group[0].case) as inputs:
            for number, (planned, row) in enumerate(zip(group, rows, strict=True)):
                self._prepare(planned, row, number, inputs)
            while unfinished := [i for i, row in enumerate(rows) if self._needs_more(row)]:
                for number in unfinished:
                    self._step(group[number], rows[number], number)
                self.save(self.run)
        for planned, row in zip(group, rows, strict=True):
            print(f"{planned.label}: {summary(row)}")
        self.save(self.run)
        return rows

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _row(self, planned: Planned) -> dict[str, Any]:
        row = {
            "provider": planned.provider,
            "product": planned.product,
            **asdict(planned.case),
            "seconds": [],
        }
        if planned.setting:
            row["setting"] = planned.setting
        self.run["rows"].append(row)
        return row

    def _needs_more(self, row: dict[str, Any]) -> bool:
        return "error" not in row and not self.rounds.enough(row["seconds"])

    def _prepare(self, planned: Planned, row: dict[str, Any], number: int, inputs: str | None) -> None:
        if planned.process not in self.workers:
            environment = product_environment(planned.product) | self.environments.get(planned.setting, {})
            self.workers[planned.process] = Worker(planned.provider, environment)
        try:
            row |= self.workers[planned.process].prepare(str(number), planned.case, inputs)
        except ProviderFailed as failure:
            self._fail(planned, row, str(failure))

    def _step(self, planned: Planned, row: dict[str, Any], number: int) -> None:
        if planned.process not in self.workers:  # another row ended it
            self._fail(planned, row, "its process ended")
            return
        try:
            row["seconds"] += self.workers[planned.process].turn(str(number))
        except ProviderFailed as failure:
            self._fail(planned, row, str(failure))

    def _fail(self, planned: Planned, row: dict[str, Any], reason: str) -> None:
        row["error"] = reason
        row.pop("seconds")
        worker = self.workers.pop(planned.process, None)
        if worker is not None:
            worker.close()


def summary(row: dict[str, Any]) -> str:
    """Return the median and the range of a row's times, or why there are none."""
    if "error" in row:
        return row["error"]
    times = row["seconds"]
    spread = f"{min(times):.4g} to {max(times):.4g} s"
    return f"{statistics.median(times):.4g} s ({spread}, {len(times)} steps)"


def product_environment(product: Product) -> dict[str, str]:
    return {PRODUCT_VARIABLE: "onednn" if product == "oneDNN" else "torch"}


def chosen_product() -> Product:
    """Return what fused-distill multiplies float32 matrices with on this CPU."""
    from fused_distill.chunked.cpu_product import cpu_product

    return "oneDNN" if cpu_product().library == "onednn" else "torch.mm"


@contextmanager
def shared_inputs(case: Case) -> Iterator[str | None]:
    """Provide a file with a case's inputs, of which all processes on a CPU map one copy; None on a GPU."""
    if case.device != "cpu":
        yield None
        return
    n_bytes = 4 * (case.tokens + case.vocab) * (case.student_dim + case.teacher_dim)
    memory = Path("/dev/shm")
    in_memory = memory.is_dir() and shutil.disk_usage(memory).free > 2 * n_bytes
    with tempfile.TemporaryDirectory(dir=memory if in_memory else None) as folder:
        yield str(Path(folder) / "inputs.pt")


def saved_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a result file; older files hold a single run without a list."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return content.get("runs", [content])


def save_run(path: Path, earlier: list[dict[str, Any]], run: dict[str, Any]) -> None:
    write_json(path, {"runs": [*earlier, run]})


def device_name(device: str) -> str:
    """Return the name of the device, with the number of threads of a CPU."""
    about = machine()
    return about.get("gpu", "small") if device == "cuda" else f"{about['cpu']} {about['threads']} threads"


def slug(*words: str) -> str:
    """Return a file name of lower-case words."""
    text = re.sub(r"\((r|tm)\)|\bprocessor\b", " ", " ".join(words).lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def main(script: str, device: str, parts: Mapping[str, Callable[[bool], list[list[Planned]]]]) -> int:
    """Measure parts of a benchmark, one after another, and append a run for each to the device's results.

    A part is a function from --small to groups of rows. Reports use complete runs only: all rows of a part.
    """
    parser = argparse.ArgumentParser(description=f"{script}: appends runs to a result file in bench/results/")
    parser.add_argument("parts", nargs="*", help=f"what to measure, of {', '.join(parts)} (default: all)")
    parser.add_argument("--output", type=Path, help="result file (default: named after the device)")
    parser.add_argument("--only", default="", help="regular expression: measure rows whose label matches it")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, to check the code paths on any machine"
    )
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in parts]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
    if device == "cuda" and not arguments.small and not torch.cuda.is_available():
        parser.error("no GPU found; use --small to run tiny sizes on the CPU")
    name = f"{slug(Path(script).stem, device_name(device))}.json"
    output = (arguments.output or results_folder(arguments.small) / name).resolve()
    rounds = Rounds(0.0, 2) if arguments.small else Rounds()
    for part in arguments.parts or parts:
        groups = [
            [row for row in group if re.search(arguments.only, row.label)]
            for group in parts[part](arguments.small)
        ]
        run = {**header(), "part": part, "peak": {}, "rows": []}
        with recorded(output, run, rounds, complete=not arguments.only) as suite:
            for group in filter(None, groups):
                measure_peak(run, group[0].case, arguments.small)
                suite.measure(group)
    print(output)
    return 0


@contextmanager
def recorded(
    output: Path,
    run: dict[str, Any],
    rounds: Rounds,
    *,
    complete: bool,
    environments: dict[str, dict[str, str]] | None = None,
) -> Iterator[Suite]:
    """Provide a suite that appends the run to a result file, as complete only once all rows are measured."""
    run["complete"] = False
    suite = Suite(partial(save_run, output, saved_runs(output)), run, rounds, environments or {})
    try:
        yield suite
    finally:
        suite.close()
    run["complete"] = complete
    suite.save(run)


def measure_peak(run: dict[str, Any], case: Case, small: bool) -> None:
    """Keep in `run` the best rate of large products so far, in operations per second, of each library."""
    on_cpu = case.device == "cpu" and case.dtype == "float32"
    products: tuple[Product, ...] = ("torch.mm", "oneDNN") if on_cpu else ("torch.mm",)
    for product in products:
        worker = Worker("peak", product_environment(product))
        try:
            rate = worker.peak(case, 64 if small else 4096 if case.device == "cpu" else 8192)
            run["peak"][product] = max(rate, run["peak"].get(product, 0.0))
        except ProviderFailed as failure:  # this torch has no oneDNN
            print(f"peak of {product}: {failure}")
        finally:
            worker.close()
