"""Processes that an engine starts end with the server, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_SERVER = "FUSED_DISTILL_SERVER_PROCESS"  # environment variable with the server's process id
_forks_from_main_thread = False


def end_children_with_this_process() -> None:
    """Let the kernel kill every process that is started from now on when the process that started it ends.

    This holds on Linux, for SIGKILL too. It concerns processes that multiprocessing forks, and those that it
    spawns from the `fused-distill` command, whose module calls `end_with_server`. All of them ignore Ctrl-C,
    which a terminal sends to every process, so that the server can first answer its requests.
    """

    def note_thread() -> None:
        global _forks_from_main_thread
        _forks_from_main_thread = threading.current_thread() is threading.main_thread()

    def end_with_parent() -> None:
        # The kernel sends the signal when the thread that forked ends; only the main thread lasts.
        if _forks_from_main_thread:
            _end_with_parent()

    os.environ[_SERVER] = str(os.getpid())
    os.register_at_fork(before=note_thread, after_in_child=end_with_parent)


def end_with_server() -> None:
    """End with the process that started this one, if an engine of a server did."""
    if os.environ.get(_SERVER, str(os.getpid())) != str(os.getpid()):
        _end_with_parent()


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
