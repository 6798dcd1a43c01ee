"""Processes that an engine forks end with the server, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_forks_from_main_thread = False


def end_forked_children_with_this_process() -> None:
    """Let the kernel kill every process that is forked from now on when the process that forked it ends.

    This holds on Linux, for SIGKILL too. The children, and theirs, ignore Ctrl-C, which a terminal sends to
    all processes, so that the server can first answer its requests. Processes that multiprocessing spawns
    instead of forking are not affected.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)

    def note_thread() -> None:
        global _forks_from_main_thread
        _forks_from_main_thread = threading.current_thread() is threading.main_thread()

    def end_with_parent() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The kernel sends the signal when the thread that forked ends; only the main thread lasts.
        if _forks_from_main_thread:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(before=note_thread, after_in_child=end_with_parent)
