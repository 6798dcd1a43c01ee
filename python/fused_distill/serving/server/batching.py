"""Dynamic batching with a bounded queue. One thread owns the engine; an error stays within its batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..protocol.request import ScoringOptions, TokenSequence
from .engine import Result, TeacherEngine
from .validation import RequestError

MAX_FAILURES = 5  # consecutive failed batches after which the engine counts as failing
MOST_PASSED_OVER = 4  # batches that a request may wait for shorter ones
_STOPPING = 503, "the server is shutting down"


@dataclass(frozen=True)
class BatchLimits:
    """Limits of the queue and of a batch."""

    max_waiting: int = 256  # requests in the queue
    batch_tokens: int = 16384  # per engine call, padding included; a longer sequence goes alone
    window_seconds: float = 0.005  # how long a batch waits for further requests

    def __post_init__(self) -> None:
        for name in ("max_waiting", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.window_seconds >= 0:
            raise ValueError(f"window_seconds must not be negative, got {self.window_seconds}")


@dataclass(eq=False)
class _Job:
    """One request. Its sequences may go through the engine in several batches, longest first."""

    sequences: list[TokenSequence]
    options: ScoringOptions
    answers: list[asyncio.Future[Result]]  # of each sequence
    waiting: deque[int]  # indices of sequences
    waiting_tokens: int  # of those sequences
    passed_over: int = 0  # batches without a sequence of this request, since the last with one

    def fail(self, error: Exception) -> None:
        """Complete the request with an error."""
        self.waiting.clear()
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(error)


class Batcher:
    """Owner of the engine: the event loop calls `submit`, the engine runs in a thread of its own."""

    def __init__(self, engine: TeacherEngine, limits: BatchLimits, retry_after_seconds: int):
        self.engine, self.limits, self.retry_after_seconds = engine, limits, retry_after_seconds
        self.queue: list[_Job] = []  # requests with waiting sequences
        self.running = 0  # sequences in the engine
        self.failures = 0  # consecutive batches without a valid answer
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Start accepting requests."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-engine")
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *_: object) -> None:
        """Fail waiting requests, wait for a running engine call and close the engine."""
        task, self._task = self._task, None
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while self.queue:
            self.queue.pop().fail(RequestError(*_STOPPING))
        try:
            await asyncio.to_thread(self._thread.shutdown)
        finally:
            self.engine.close()

    @property
    def alive(self) -> bool:
        """True while requests are accepted."""
        return self._task is not None and not self._task.done()

    async def submit(self, sequences: list[TokenSequence], options: ScoringOptions) -> Result:
        """Return the joined answer for these sequences, at least one. Cancelling the call frees its place.

        Raises:
            RequestError: `max_waiting` requests are waiting already, or the server is shutting down.
            Exception: whatever the engine raised on a batch with one of the sequences.
        """
        if not self.alive:
            raise RequestError(*_STOPPING)
        if len(self.queue) >= self.limits.max_waiting:
            headers = {"Retry-After": str(self.retry_after_seconds)}
            raise RequestError(429, f"{len(self.queue)} requests are waiting", **headers)
        longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens))
        answers = [asyncio.get_running_loop().create_future() for _ in sequences]
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        job = _Job(sequences, options, answers, deque(longest_first), tokens)
        self.queue.append(job)
        self._arrived.set()
        try:
            parts: list[Any] = await asyncio.gather(*answers)
            return await asyncio.to_thread(type(parts[0]).join, parts)  # takes long for large answers
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
                if batch := list(self._next_batch()):
                    await self._score(batch)

    def _next_batch(self) -> Iterator[tuple[_Job, int]]:
        """Yield sequences of the most urgent request and of those with equal options, within the budget.

        The request with the fewest waiting tokens comes first, so that a short one does not wait for all
        batches of a long one. Every batch that passes a request over counts as one batch of tokens less, and
        after MOST_PASSED_OVER of them it comes in the order of arrival, so that short ones do not starve it.
        """
        longest = count = 0
        options = None
        budget = self.limits.batch_tokens

        def urgency(job: _Job) -> int:
            tokens = min(job.waiting_tokens, MOST_PASSED_OVER * budget)
            return max(0, tokens - job.passed_over * budget)

        for job in sorted(self.queue, key=urgency):
            before = count
            while job.waiting and options in (None, job.options):
                tokens = len(job.sequences[job.waiting[0]].tokens)
                if count and max(longest, tokens) * (count + 1) > budget:
                    break
                longest, count, options = max(longest, tokens), count + 1, job.options
                job.waiting_tokens -= tokens
                yield job, job.waiting.popleft()
            job.passed_over = job.passed_over + 1 if count == before else 0
            if not job.waiting:
                self.queue.remove(job)

    async def _score(self, batch: list[tuple[_Job, int]]) -> None:
        sequences = [job.sequences[i] for job, i in batch]
        self.running = len(batch)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._call_engine, sequences, batch[0][0].options
            )
            self.failures = 0 if any(answer is not None for answer in answers) else self.failures + 1
        except asyncio.CancelledError:
            for job, _ in batch:
                job.fail(RequestError(*_STOPPING))
            raise
        except BaseException as error:  # even SystemExit of an engine must not leave requests waiting
            self.failures += 1
            for job, _ in batch:
                job.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            return
        finally:
            self.running = 0
        for (job, index), answer in zip(batch, answers, strict=True):
            if answer is None:
                job.fail(RuntimeError(f"the engine gave NaN or infinity for sequence {index}"))
            elif not job.answers[index].done():
                job.answers[index].set_result(answer)

    def _call_engine(self, sequences: list[TokenSequence], options: ScoringOptions) -> list[Result | None]:
        """Return the engine's answers, None for one that has an invalid number."""
        answers = self.engine.score(sequences, options)
        if len(answers) != len(sequences):
            raise RuntimeError(f"the engine gave {len(answers)} answers for {len(sequences)} sequences")
        return [answer if answer.valid else None for answer in answers]
