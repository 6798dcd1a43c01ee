"""Processes that share a gloo group and run functions together."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from device import make_tensors_on_device
from forking import forking
from limits import seconds
from torch import distributed
from uninitialized import fill_uninitialized_memory


class Ranks:
    """A pool of `size` processes; a call runs a function of an importable module on each of them.

    The first call starts the processes. A call without an answer within `limit` seconds fails and ends them,
    and the next call starts new ones with new pipes. So a slow call fails alone, and its late answer cannot
    be taken for the next call's.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.limit = seconds(120)
        self._folder = tempfile.TemporaryDirectory()
        self._n_starts = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what function(rank, *arguments) returns on each rank, or raise the first exception."""
        outcomes = self.outcomes(function, *arguments)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return each rank's result, or the exception that it raised.

        Raises:
            TimeoutError: a rank gives no answer within the limit.
            EOFError: a rank's process has ended.
        """
        try:
            if not self._processes:
                self._start()
            outcomes = self._run(pickle.dumps((function, arguments)))
        except BaseException:
            self.close()
            raise
        if not _in_step(outcomes):
            self.close()
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = forking()
        self._n_starts += 1
        store = str(Path(self._folder.name) / f"store{self._n_starts}")
        for rank in range(self.size):
            pipe, remote_pipe = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, remote_pipe), daemon=True)
            process.start()
            remote_pipe.close()  # the rank's own copy is the only one left: its end is an EOFError here
            self._pipes.append(pipe)
            self._processes.append(process)

    def _run(self, task: bytes) -> list[Any]:
        for pipe in self._pipes:
            pipe.send_bytes(task)
        deadline = time.monotonic() + self.limit
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"rank {rank} gave no answer within {self.limit} seconds")
            outcomes.append(pickle.loads(pipe.recv_bytes()))
        return outcomes


def _in_step(outcomes: list[Any]) -> bool:
    """Return False if a rank may have left the others in a collective, which breaks the group."""
    types = {type(outcome) if isinstance(outcome, Exception) else None for outcome in outcomes}
    return len(types) == 1 and not any(isinstance(outcome, RuntimeError) for outcome in outcomes)


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """Run the tasks that arrive through the pipe until it is closed."""
    torch.set_num_threads(1)
    make_tensors_on_device()
    fill_uninitialized_memory()
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds(60)),
    )
    while True:
        task = pipe.recv_bytes()
        try:
            function, arguments = pickle.loads(task)
            answer = pickle.dumps(function(rank, *arguments))
        except Exception as error:
            answer = pickle.dumps(error)
        pipe.send_bytes(answer)
