"""What a run reports: metrics.jsonl, the console, trackers and report.html."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from ..shortened import shortened
from .atomic import write_whole
from .config import TrainConfig, flat_settings
from .console import RunConsole
from .report import Row, write_report


class MetricsLogger:
    """Logs metrics on the main process; on other processes its methods do nothing."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, resumed_step: int):
        self.accelerator, self.config = accelerator, config
        self.path = config.output / "metrics.jsonl"
        self.rows: list[Row] = []  # of metrics.jsonl
        self._unprinted: list[Row] = []
        if config.trackers:
            _init_trackers(accelerator, config)
        if accelerator.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            self.rows, notices = open_history(self.path, resumed_step)
            self.console = RunConsole(config.steps, resumed_step)
            for notice in notices:
                self.console.print(notice)

    def log(
        self, step: int, kind: str, metrics: dict[str, float], samples: Sequence[dict[str, str]] = ()
    ) -> None:
        """Log the metrics of a step (kind "train") or an evaluation (kind "evaluation") with its samples."""
        if not self.accelerator.is_main_process:
            return
        row = {"step": step, "kind": kind, **metrics, **({"samples": list(samples)} if samples else {})}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        if self.config.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)
        if kind == "evaluation":
            self._print_steps()
            self.console.print_evaluation(row)
            self.write_report()
            return
        self._unprinted.append(row)
        self.console.advance(row)
        first_empty = row["tokens"] == 0 and all(
            r["tokens"] > 0 for r in self.rows[:-1] if r["kind"] == "train"
        )
        if first_empty or step % self.config.log_every == 0 or step == self.config.steps:
            self._print_steps()

    def write_report(self) -> None:
        """Write report.html of the run so far."""
        if self.accelerator.is_main_process:
            write_report(self.config, self.rows, empty_steps(self.rows))

    def finish(self) -> None:
        """Write the report, and print a summary of the run."""
        if not self.accelerator.is_main_process:
            return
        self._print_steps()
        self.write_report()
        self.close()
        self.console.print_summary(self.rows)
        for warning in empty_steps(self.rows):
            self.console.warn(warning)
        self.console.print(f"curves and samples: {self.config.output / 'report.html'}")

    def close(self) -> None:
        """End the progress bar."""
        if self.accelerator.is_main_process:
            self.console.close()

    def _print_steps(self) -> None:
        if self._unprinted:
            self.console.print_steps(self._unprinted)
            if any(row["tokens"] == 0 for row in self._unprinted):
                self.console.warn(*empty_steps(self.rows))
        self._unprinted = []


def empty_steps(rows: Sequence[Row]) -> list[str]:
    """Return a warning if steps had only empty completions, else nothing."""
    trained = [row for row in rows if row["kind"] == "train"]
    empty = [row["step"] for row in trained if row["tokens"] == 0]
    if not empty:
        return []
    which = f"all {len(trained)}" if len(empty) == len(trained) else f"{len(empty)} of {len(trained)}"
    return [
        f"in {which} steps every completion was empty, so the loss was 0 and the student learned nothing "
        f"(the first was step {empty[0]}). The student ends its answers at once: check its end tokens and "
        "the format of the prompts"
    ]


def open_history(path: Path, resumed_step: int) -> tuple[list[Row], list[str]]:
    """Prepare metrics.jsonl for a run, and return the rows that it keeps and what to tell the user.

    A run from the start keeps the files of an earlier run under numbered names. A resumed run keeps the rows
    up to its checkpoint, because it repeats the steps after it.
    """
    if not path.exists() or not path.stat().st_size:
        return [], []
    if resumed_step == 0:
        earlier = [file for file in (path, path.with_name("report.html")) if file.exists()]
        kept = [(file, _numbered(file)) for file in earlier]
        for file, copy in kept:
            file.replace(copy)
        names = ", ".join(f"{file.name} as {copy.name}" for file, copy in kept)
        return [], [f"{path.parent} holds an earlier run, whose files are kept: {names}"]
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # the process was killed while it wrote
        lines.pop()
    rows, broken = list[Row](), list[str]()
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None:
            broken.append(f"line {number} is not a line of metrics: {shortened(line.rstrip())}")
        elif row["step"] <= resumed_step:
            rows.append(row)
    notices: list[str] = []
    if broken:
        copy = _numbered(path)
        shutil.copyfile(path, copy)
        kept = (
            f"it keeps {len(rows)} sound lines up to step {resumed_step}; {copy.name} is the file as it was"
        )
        notices.append(f"{path}: {'; '.join(broken)}; {kept}")
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows, notices


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)
    return row if sound else None


def _numbered(path: Path) -> Path:
    """Return a free name beside a file, e.g. metrics-1.jsonl."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, 1 << 30))
    return next(name for name in names if not name.exists())


def _init_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers with one key per setting; the run is named after its output folder."""
    settings = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in flat_settings(config).items()
    }
    name = {"name": config.output.resolve().name}
    options = {tracker: name for tracker in config.trackers if tracker != "tensorboard"}
    # TensorBoard names a run after its folder in the output folder.
    accelerator.init_trackers("fused-distill", settings, init_kwargs=options)
