"""SIGTERM and Ctrl-C: a run ends after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from accelerate import Accelerator


class RunStopped(SystemExit):
    """A signal has ended the run before its last step. The code is the exit status, 130 or 143."""


class StopSignals:
    """Remembers a first SIGTERM or SIGINT inside the block. A second SIGINT interrupts at once."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stopping(self) -> bool:
        """Return True if any process has received a signal; all processes call it together."""
        return self._accelerator.check_trigger()

    @property
    def status(self) -> int:
        """The exit status of a stopped run, as shells report the signal: 130 or 143."""
        return 128 + (self._received or signal.SIGTERM)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        self._accelerator.set_trigger()
        if number == signal.SIGINT and self._accelerator.is_main_process:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not reentrant
