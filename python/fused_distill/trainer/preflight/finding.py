"""What a check found, and the screen that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


class Finding(NamedTuple):
    """What a check found; the text of a warning says what to do."""

    level: Literal["ok", "warning", "error"]
    name: str
    text: str


def ok(text: str) -> Finding:
    """Return a finding without a fault, to be named by the caller."""
    return Finding("ok", "", text)


def warning(text: str) -> Finding:
    """Return a finding that may spoil a run, to be named by the caller."""
    return Finding("warning", "", text)


def error(text: str) -> Finding:
    """Return a finding with which a run cannot start, to be named by the caller."""
    return Finding("error", "", text)


def one_line(problem: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(problem).split()) or type(problem).__name__


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print one row per finding: a tick, a warning or a cross; without a terminal its level as a word."""
    console = console or Console()
    if not console.is_terminal:
        for level, name, text in findings:
            print(f"{level:<8} {name}: {text}", file=console.file, flush=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for level, name, text in findings:
        mark, colour = _MARKS[level]
        table.add_row(Text(mark, colour), Text(name, "bold"), Text(text))
    console.print(table)
