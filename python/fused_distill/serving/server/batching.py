"""Requests of many clients through one engine: one owner, bounded waiting, errors that stay in a batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..protocol.request import ScoringOptions, TokenSequence
from .transformers_engine import Result, TeacherEngine

_FAILURES = 5  # batches in a row


class QueueFull(Exception):
    """No place is free; the client should come again."""


class Stopped(Exception):
    """The server is stopping and takes nothing new."""


@dataclass(frozen=True)
class BatchLimits:
    """How requests wait and are put together."""

    max_waiting: int = 256  # requests
    batch_tokens: int = 16384  # of one engine call, padding included; a longer sequence goes alone
    window_seconds: float = 0.005  # how long a batch waits for company

    def __post_init__(self) -> None:
        if self.max_waiting < 1 or self.batch_tokens < 1 or not self.window_seconds >= 0:
            raise ValueError(f"batch limits must be positive, got {self}")


@dataclass(eq=False)
class _Job:
    """One request; its sequences may go through the engine in several batches, the longest first."""

    sequences: list[TokenSequence]
    execution: ScoringOptions
    result: asyncio.Future[list[Result]]
    waiting: deque[int] = field(init=False)
    answers: dict[int, Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i].tokens))
        self.waiting = deque(order)

    def take(self, index: int, answer: Result) -> None:
        """Keep one sequence's answer; with the last one the request is done."""
        self.answers[index] = answer
        if len(self.answers) == len(self.sequences) and not self.result.done():
            self.result.set_result([self.answers[i] for i in range(len(self.sequences))])

    def fail(self, error: Exception) -> None:
        """The request is done with this error."""
        self.waiting.clear()
        if not self.result.done():
            self.result.set_exception(error)


class Batcher:
    """The engine's one owner: `submit` from the event loop, the engine runs in a thread of its own."""

    def __init__(self, engine: TeacherEngine, limits: BatchLimits | None = None):
        self.engine = engine
        self.limits = limits or BatchLimits()
        self.queue: deque[_Job] = deque()  # requests with sequences that wait
        self.running = 0  # sequences in the engine
        self._failures = 0  # batches in a row that the engine raised on
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        """Start taking requests."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-engine")
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop: whoever still waits gets `Stopped`, a running engine call is waited for."""
        task, self._task = self._task, None
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while self.queue:
            self.queue.popleft().fail(Stopped())
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._task is not None and not self._task.done()

    @property
    def failing(self) -> bool:
        """Whether the engine seems to be dead: it has raised on every one of the last batches."""
        return self._failures >= _FAILURES

    async def submit(self, sequences: list[TokenSequence], execution: ScoringOptions) -> Result:
        """The answer for these sequences, at least one. Cancelling this call frees its place.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            Stopped: the server is stopping.
            Exception: whatever the engine raised on a batch with one of the sequences.
        """
        if not self.alive:
            raise Stopped
        if len(self.queue) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self.queue)} requests are waiting")
        job = _Job(sequences, execution, asyncio.get_running_loop().create_future())
        self.queue.append(job)
        self._arrived.set()
        try:
            parts: list[Any] = await job.result
            return await asyncio.to_thread(type(parts[0]).join, parts)  # may be long
        finally:
            job.waiting.clear()
            if job in self.queue:
                self.queue.remove(job)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self.queue:
                await asyncio.sleep(self.limits.window_seconds)
                batch = list(self._next_batch())
                if batch:
                    await self._score(batch)

    def _next_batch(self) -> Iterator[tuple[_Job, int]]:
        """Sequences of the first request and of those behind it with its execution, within the budget."""
        longest = count = 0
        execution = None
        for job in list(self.queue):
            if execution not in (None, job.execution):
                continue
            while job.waiting:
                length = max(longest, len(job.sequences[job.waiting[0]].tokens))
                if count and length * (count + 1) > self.limits.batch_tokens:
                    break
                longest, count, execution = length, count + 1, job.execution
                yield job, job.waiting.popleft()
            if not job.waiting:
                self.queue.remove(job)

    async def _score(self, batch: list[tuple[_Job, int]]) -> None:
        sequences = [job.sequences[i] for job, i in batch]
        jobs = list(dict.fromkeys(job for job, _ in batch))
        self.running = len(batch)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._answers, sequences, jobs[0].execution
            )
            self._failures = 0
        except asyncio.CancelledError:
            for job in jobs:
                job.fail(Stopped())
            raise
        except BaseException as error:  # even SystemExit of an engine must not leave requests waiting
            self._failures += 1
            for job in jobs:
                job.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            return
        finally:
            self.running = 0
        for (job, index), answer in zip(batch, answers, strict=True):
            if answer is None:
                job.fail(RuntimeError(f"the engine gave numbers that are not finite for sequence {index}"))
            else:
                job.take(index, answer)

    def _answers(self, sequences: list[TokenSequence], execution: ScoringOptions) -> list[Result | None]:
        """The engine's, None where a number is missing."""
        answers = self.engine.score(sequences, execution)
        if len(answers) != len(sequences):
            raise RuntimeError(f"the engine gave {len(answers)} answers for {len(sequences)} sequences")
        return [answer if answer.valid else None for answer in answers]
