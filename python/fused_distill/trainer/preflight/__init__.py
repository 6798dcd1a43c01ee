"""Checks of a run before its first step, by `preflight` in a run and by `fused-distill check`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..checkpoint import list_checkpoints
from ..config import ConfigError, TrainConfig
from ..start import check_output
from ..teachers import HiddenStateTeacher, ServedTeacher
from .chat import compare_chats
from .finding import Finding, one_line, show
from .models import loss_of_a_few_tokens, student_head, teacher_head, told_loss
from .server import limits, same_answers
from .step_estimate import estimate

if TYPE_CHECKING:
    from ..loop import Trainer

# What a fault of settings, files, models or servers raises.
_FAULTS = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)


def check(config: TrainConfig) -> bool:
    """Load what a run needs, check it, show what was found, and return whether the run can start.

    It also times a forward and a backward pass and, with rollouts by transformers, the generation of a few
    tokens.
    """
    from ..loop import Trainer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        check_output(config.output)
        run = Trainer(config)
    except _FAULTS as error:
        show([Finding("error", "settings, files and models", one_line(error))])
        return False
    with closing(run.rollouts):
        findings = preflight(run, timed=True)
        if list_checkpoints(config.output):
            text = f"{config.output} holds checkpoints: train with --resume, or set another output"
            findings.append(Finding("warning", "output", text))
        if run.accelerator.is_main_process:
            show(findings)
        run.accelerator.end_training()
    return not any(finding.level == "error" for finding in findings)


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
    findings = [_attempt("student's LM head", lambda: student_head(run))]
    for name, teacher in run.teachers.items():
        who = f"teacher {name}".rstrip()
        losses: list[float] = []

        def loss(name: str = name, losses: list[float] = losses) -> Finding:
            losses.append(loss_of_a_few_tokens(run, name))
            return told_loss(run, name, losses[0])

        checks: list[tuple[str, Callable[[], Finding | None]]] = [
            (f"{who}'s LM head", lambda teacher=teacher: teacher_head(teacher)),
            (f"{who}'s chat format", lambda teacher=teacher: compare_chats(run, teacher)),
        ]
        if isinstance(teacher, ServedTeacher | HiddenStateTeacher):
            checks.append((f"{who}'s limits", lambda teacher=teacher: limits(teacher)))
            checks.append((f"{who}'s answers", lambda teacher=teacher: same_answers(teacher)))
        findings.append(_attempt(f"{who}'s loss", loss))
        if run.accelerator.is_main_process:
            findings += [_attempt(what, test) for what, test in checks]
    findings.append(_attempt("time and memory of a step", lambda: estimate(run, timed)))
    box: list[Any] = [[finding for finding in findings if finding is not None]]
    broadcast_object_list(box)
    return box[0]


def _attempt(name: str, test: Callable[[], Finding | None]) -> Finding | None:
    """Return what a check found under its name; a fault that it raises is an error."""
    try:
        found = test()
    except _FAULTS as error:
        return Finding("error", name, one_line(error))
    return None if found is None else found._replace(name=name)
