"""What `fused-distill check` does: it loads what a run needs, checks it, and trains nothing."""

from __future__ import annotations

import logging
from contextlib import closing

from .checkpoint import list_checkpoints
from .config import TrainConfig
from .loop import Trainer
from .preflight import FAULTS, preflight
from .preflight.finding import Finding, one_line, show
from .start import check_output


def check(config: TrainConfig) -> bool:
    """Load what a run needs, check it, show what was found, and return whether the run can start.

    It also times a forward and a backward pass and, with rollouts by transformers, the generation of a few
    tokens.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        check_output(config.output)
        run = Trainer(config)
    except FAULTS as error:
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
