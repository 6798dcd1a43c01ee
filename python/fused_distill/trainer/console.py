"""What the main process of a run prints: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .report import POLICIES, Row, before_and_after, describe, phase_seconds

SHOWN_SAMPLES = 2
_LOSSES = {"loss": "loss", "full_loss": "full loss"}  # metrics of a line, and their names there
_LINE = {
    "forward_kl": "forward KL",
    "topk_forward_kl": "top-k forward KL",
    "reverse_kl": "reverse KL",
    "topk_reverse_kl": "top-k reverse KL",
    "sampled_reverse_kl": "sampled reverse KL",
    "top1_agreement": "top-1",
    "topk_top1_agreement": "top-k top-1",
    "student_mass": "student mass",
    "completion_length": "length",
}


class RunConsole:
    """Console of a run."""

    def __init__(self, steps: int, start: int):
        self.console, self._steps = Console(soft_wrap=True), steps
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._progress.add_task("", total=steps, completed=start)
        self._progress.start()

    def advance(self, row: Row) -> None:
        """Move the progress bar to a step."""
        text = f"loss {row['loss']:.4g}  {row['tokens_per_second']:,.0f} tokens/s  time left"
        self._progress.update(self._task, completed=row["step"], description=text)

    def print_steps(self, rows: Sequence[Row]) -> None:
        """Print a line of means over some steps, each token with the same weight."""
        losses = [f"loss {_mean(rows, 'loss'):.4g}"]
        apart = [
            f"{label} {_mean(rows, f'{policy}/loss', f'{policy}/tokens'):.4g}"
            for policy, label in POLICIES.items()
            if any(f"{policy}/loss" in row for row in rows)
        ]
        if apart:
            losses.append(f"({', '.join(apart)})")
        others = [f"{label} {_mean(rows, name):.4g}" for name, label in _LINE.items() if name in rows[-1]]
        speed = f"{_mean(rows, 'tokens_per_second'):,.0f} tokens/s"
        self.print("  ".join([f"step {rows[-1]['step']}/{self._steps}", " ".join(losses), *others, speed]))

    def print_evaluation(self, row: Row) -> None:
        """Print the metrics of an evaluation, and two of its samples."""
        labels = (_LOSSES | _LINE).items()
        values = [f"{label} {row[name]:.4g}" for name, label in labels if name in row]
        self.print("  ".join([f"evaluation at step {row['step']}", *values]))
        for sample in row.get("samples", [])[:SHOWN_SAMPLES]:
            prompt, completion = sample["prompt"], sample["completion"]
            self.print(f"  prompt      {'...' if len(prompt) > 200 else ''}{prompt[-200:]!r}")
            self.print(f"  completion  {completion[:400]!r}{'...' if len(completion) > 400 else ''}")

    def print_summary(self, rows: Sequence[Row]) -> None:
        """Print the metrics before and after, the time of each phase, and the memory."""
        table = Table("held-out prompts", "before", "after", box=None, pad_edge=False)
        for name, before, after in before_and_after(rows):
            table.add_row(describe(name), f"{before:.4g}", f"{after:.4g}")
        phases = Table("phase", "time", "share", box=None, pad_edge=False)
        seconds = phase_seconds(rows)
        for label, spent in seconds.items():
            share = spent / max(sum(seconds.values()), 1e-9)
            phases.add_row(label, _duration(spent), f"{share:.0%}")
        phases.add_row("peak memory", f"{max((r.get('memory_gib', 0.0) for r in rows), default=0.0):.2f} GiB")
        for part in (table, phases) if table.row_count else (phases,):
            self.console.print(part, soft_wrap=False)

    def print(self, text: str) -> None:
        """Print a line; characters that the terminal's encoding lacks become question marks."""
        text = text.encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Print a line that is not to be overlooked."""
        self.console.print(f"WARNING: {text}", markup=False, highlight=False, style="bold red")

    def close(self) -> None:
        """Leave the terminal without a progress bar."""
        self._progress.stop()


def _mean(rows: Sequence[Row], name: str, weight: str = "tokens") -> float:
    weighted = [(row[name], row[weight]) for row in rows if name in row]
    total = sum(tokens for _, tokens in weighted)
    return sum(value * tokens for value, tokens in weighted) / total if total else 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )
