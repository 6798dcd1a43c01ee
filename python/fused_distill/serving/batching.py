"""Requests of many clients through one engine: one owner, bounded waiting, errors that stay in a batch."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .engine import Execution, Sequence, TeacherEngine
from .wire import Answer


class QueueFull(Exception):
    """No place is free; the client should come again."""


@dataclass(frozen=True)
class BatchLimits:
    """How requests wait and are put together."""

    max_waiting: int = 256  # requests
    batch_tokens: int = 16384  # of one engine call; a longer request goes alone
    window_seconds: float = 0.005  # how long a batch waits for company


@dataclass(eq=False)
class _Job:
    sequences: list[Sequence]
    execution: Execution
    answer: asyncio.Future[Answer]


class Batcher:
    """The engine's one owner: `submit` from the event loop, the engine runs in a thread of its own."""

    def __init__(self, engine: TeacherEngine, limits: BatchLimits | None = None):
        self.engine = engine
        self.limits = limits or BatchLimits()
        self.waiting: deque[_Job] = deque()
        self.running = 0  # requests in the engine
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-engine")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        """Start taking requests."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; whoever still waits is cancelled, a running engine call is waited for."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        while self.waiting:
            self.waiting.popleft().answer.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, sequences: list[Sequence], execution: Execution) -> Answer:
        """The answer for these sequences. Cancelling this call frees its place.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            Exception: whatever the engine raised on the batch.
        """
        if len(self.waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting")
        job = _Job(sequences, execution, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self._arrived.set()
        try:
            return await job.answer
        finally:
            if job in self.waiting:
                self.waiting.remove(job)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self.waiting:
                await asyncio.sleep(self.limits.window_seconds)
                batch = self._take_batch()
                if batch:
                    await self._score(batch)

    def _take_batch(self) -> list[_Job]:
        """The first waiting request and those behind it that share its execution, within the token budget."""
        batch: list[_Job] = []
        longest = count = 0
        for job in list(self.waiting):
            if batch and job.execution != batch[0].execution:
                continue
            wider = max(longest, max(len(s.tokens) for s in job.sequences))
            if batch and wider * (count + len(job.sequences)) > self.limits.batch_tokens:
                continue
            longest, count = wider, count + len(job.sequences)
            batch.append(job)
            self.waiting.remove(job)
        return batch

    async def _score(self, batch: list[_Job]) -> None:
        sequences = [s for job in batch for s in job.sequences]
        self.running = len(batch)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, self.engine.score, sequences, batch[0].execution
            )
            if len(answers) != len(sequences):
                raise RuntimeError(f"the engine gave {len(answers)} answers for {len(sequences)} sequences")
        except Exception as error:
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        finally:
            self.running = 0
        remaining = iter(answers)
        for job in batch:
            own = [next(remaining) for _ in job.sequences]
            if not job.answer.done():
                job.answer.set_result(Answer.join(own))
