"""Checks of a run before its first step: `preflight`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..config import ConfigError
from .chat import compare_chats
from .finding import Finding, one_line, show
from .models import check_loss, student_head, teacher_head
from .server import limits, same_answers
from .step_estimate import estimate
from .teacher_of_run import teachers_of

if TYPE_CHECKING:
    from ..loop import Trainer

# What a fault of settings, files, models or servers raises.
FAULTS = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)


def require(findings: list[Finding], main: bool) -> None:
    """Show what was found on the main process.

    Raises:
        ConfigError: a check failed (the message has them all).
    """
    if main:
        show(findings)
    failed = [f"{finding.name}: {finding.text}" for finding in findings if finding.level == "error"]
    if failed:
        raise ConfigError("; ".join(failed))


def preflight(run: Trainer, timed: bool = False) -> list[Finding]:
    """Return what the checks found. All processes call this together and get the findings of the first.

    Args:
        run: models and data, before or after a checkpoint was loaded.
        timed: time a small step too, which leaves weights and random numbers of the run as they are.
    """
    findings = [_attempt("student's LM head", partial(student_head, run))]
    for teacher in teachers_of(run):
        who = teacher.title
        findings.append(_attempt(f"{who}'s loss", partial(check_loss, run, teacher)))
        if run.accelerator.is_main_process:
            findings.append(_attempt(f"{who}'s LM head", partial(teacher_head, teacher.teacher)))
            findings.append(_attempt(f"{who}'s chat format", partial(compare_chats, run, teacher)))
            findings.append(_attempt(f"{who}'s limits", partial(limits, teacher)))
            findings.append(_attempt(f"{who}'s answers", partial(same_answers, teacher)))
    findings.append(_attempt("time and memory of a step", partial(estimate, run, timed)))
    box: list[Any] = [[finding for finding in findings if finding is not None]]
    broadcast_object_list(box)
    return box[0]


def _attempt(name: str, test: Callable[[], Finding | None]) -> Finding | None:
    """Return what a check found under its name; a fault that it raises is an error."""
    try:
        found = test()
    except FAULTS as error:
        return Finding("error", name, one_line(error))
    return None if found is None else found._replace(name=name)
