"""Rollouts of the next step, which a server generates while the current step trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..rollouts.base import Completion


class RolloutsAhead:
    """At most one request in a thread. Its completions are part of a checkpoint, for accelerate."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._seed: int | None = None  # of the request, by which it is recognized, with its prompts
        self._prompts: list[list[int]] = []
        self._future = Future[list[Completion]]()
        self._collected: list[Any] = []  # of all processes

    def start(
        self, seed: int | None, prompts: list[list[int]], generate: Callable[[], list[Completion]]
    ) -> None:
        """Generate in a thread, which does not keep the process from ending."""
        self._seed, self._prompts, self._future = seed, prompts, Future()
        Thread(target=_complete, args=(self._future, generate), daemon=True).start()

    def take(self, seed: int | None, prompts: list[list[int]]) -> Callable[[], list[Completion]] | None:
        """Return what waits for the completions of a request, or None if another or none was started."""
        self.wait()
        if self._seed is None or (self._seed, self._prompts) != (seed, prompts):
            return None
        self._seed = None
        return self._future.result

    def wait(self) -> None:
        """Wait until the server has answered, because it must not get other weights before."""
        if self._seed is not None:
            wait([self._future])

    def collect(self) -> None:
        """Gather the completions of all processes for a checkpoint; all of them call it together."""
        self.wait()
        # After an error a resumed run generates again, as this one will.
        failed = self._seed is None or self._future.exception() is not None
        own = [] if failed else [tuple(c) for c in self._future.result()]
        self._collected = gather_object([(self._seed, own)])

    def state_dict(self) -> dict[str, Any]:
        """Return what `collect` gathered."""
        return {"processes": self._collected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this process's request and its completions, if there are as many processes as before."""
        processes = state["processes"]
        if len(processes) == self._accelerator.num_processes:
            seed, own = processes[self._accelerator.process_index]
            if own:
                completions = [Completion(*fields) for fields in own]
                prompts = {c.group: c.prompt for c in completions}
                self._seed, self._prompts = seed, [prompts[group] for group in sorted(prompts)]
                self._future = Future()
                self._future.set_result(completions)


def _complete(future: Future[list[Completion]], generate: Callable[[], list[Completion]]) -> None:
    try:
        future.set_result(generate())
    except BaseException as error:  # it is raised where the result is taken
        future.set_exception(error)
