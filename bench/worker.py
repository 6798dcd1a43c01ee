"""Run one provider in its own process: the parent sends commands over a pipe, the child measures.

python bench/worker.py PROVIDER        (started by Worker, not by hand)
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from providers import Case

if TYPE_CHECKING:
    from torch import Tensor


class ProviderFailed(Exception):
    """A provider cannot run a case; the message goes into the results."""


class Worker:
    """Parent's end of the pipe. `clock` is the total time in seconds of the steps so far."""

    def __init__(self, provider: str):
        self.clock = 0.0
        self._child = subprocess.Popen(
            [sys.executable, __file__, provider],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Keep a provider's output out of the terminal.
            stderr=subprocess.DEVNULL,
        )

    def prepare(self, case: Case) -> dict[str, float | None]:
        """Make inputs, warm up, and measure memory; see `_Measured.prepare`."""
        return self._ask("prepare", **asdict(case))

    def step(self) -> None:
        """Run one forward and backward pass."""
        self.clock += self._ask("step")["seconds"]

    def close(self) -> None:
        """Stop the child."""
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait()

    def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        assert self._child.stdin
        assert self._child.stdout
        try:
            self._child.stdin.write(json.dumps([verb, arguments]) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._child.stdout.readline()
        if not answer:
            raise ProviderFailed(f"process ended with status {self._child.wait()}")
        answer = json.loads(answer)
        if "error" in answer:
            raise ProviderFailed(answer["error"])
        return answer


class _Measured:
    """Child's end of the pipe."""

    def __init__(self, provider: str):
        self.provider = provider
        self.compiled_for: Case | None = None
        self.step_function: Callable[[], Tensor | None] | None = None

    def prepare(self, **case_fields: Any) -> dict[str, float | None]:
        """Make inputs, run a warm-up step, then measure the memory of a second one (not for the floor).

        extra_bytes is the peak beyond the memory in use before the step, including the two gradients
        (gradient_bytes). It is None where the system does not report it. The loss and the norms of the
        gradients show whether providers computed the same.
        """
        import torch
        from providers import make_inputs, make_step

        case = Case(**case_fields)
        if replace(case, tokens=0) != self.compiled_for:  # no peer's chunks depend on the token count
            torch.compiler.reset()
            self.compiled_for = replace(case, tokens=0)
        self.step_function = None
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
        inputs = make_inputs(case)
        self.device = inputs.student_hidden.device
        self.step_function = make_step(self.provider, case, inputs)
        loss = self.step_function()
        if loss is None:
            return {}
        answer: dict[str, float | None] = {"loss": loss.item()}
        for tensor in inputs:
            tensor.grad = None
        answer["extra_bytes"] = self._peak_of(self.step_function)
        gradients = [t.grad for t in inputs if t.grad is not None]
        answer["gradient_bytes"] = sum(g.nbytes for g in gradients)
        answer |= {f"gradient_norm_{i}": g.double().norm().item() for i, g in enumerate(gradients)}
        return answer

    def step(self) -> dict[str, float]:
        """Run one step and time it, by CUDA events on a GPU."""
        import torch

        assert self.step_function
        if self.device.type != "cuda":
            started = time.perf_counter()
            self.step_function()
            return {"seconds": time.perf_counter() - started}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        self.step_function()
        end.record()
        torch.cuda.synchronize()
        return {"seconds": begin.elapsed_time(end) / 1000}

    def _peak_of(self, function: Callable[[], Tensor | None]) -> int | None:
        import torch

        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if not sys.platform.startswith("linux"):
            function()
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # otherwise a step reuses heap memory of the previous one
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status_bytes("VmRSS")
        function()
        return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """Return a size from /proc/self/status (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps prints of providers out of the answers
    measured = _Measured(sys.argv[1])
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = getattr(measured, verb)(**arguments)
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
