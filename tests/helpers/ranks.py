"""Processes that share a gloo group and run functions together."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

_SECONDS = 120


class Ranks:
    """`size` processes, started once; a call runs a function of an importable module on each."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = str(Path(self._folder.name) / "store")
        self._pipes, theirs = zip(*(context.Pipe() for _ in range(size)), strict=True)
        self._processes = [
            context.Process(target=_serve, args=(rank, size, meeting_point, pipe), daemon=True)
            for rank, pipe in enumerate(theirs)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(rank, *arguments) returns on each rank; raises what the first of them raises."""
        for result in (results := self.outcomes(function, *arguments)):
            if isinstance(result, Exception):
                raise result
        return results

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same, with exceptions among the results."""
        task = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        results = []
        for pipe in self._pipes:
            assert pipe.poll(_SECONDS), "a rank does not answer"
            results.append(pickle.loads(pipe.recv_bytes()))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, meeting_point: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_SECONDS // 2),
    )
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = error
        pipe.send_bytes(pickle.dumps(result))
