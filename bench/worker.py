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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from providers import Case

if TYPE_CHECKING:
    from providers import Inputs
    from torch import Tensor


class ProviderFailed(Exception):
    """A provider cannot run a case; the message goes into the results."""


class Worker:
    """Parent's end of the pipe to a process with these additional environment variables."""

    def __init__(self, provider: str, environment: dict[str, str] | None = None):
        self._child = subprocess.Popen(
            [sys.executable, __file__, provider],
            env=os.environ | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Keep a provider's output out of the terminal.
            stderr=subprocess.DEVNULL,
        )

    def prepare(self, key: str, case: Case, inputs: str | None = None) -> dict[str, float | None]:
        """Make or map inputs, warm up, and measure memory; see `_Measured.prepare`."""
        return self._ask("prepare", key=key, inputs=inputs, **asdict(case))

    def turn(self, key: str) -> list[float]:
        """Run forward and backward passes of a prepared case and return the times of some in seconds."""
        return self._ask("turn", key=key)["seconds"]

    def peak(self, case: Case, size: int) -> float:
        """Return the best rate of a product of square matrices, in operations per second."""
        return self._ask("peak", size=size, **asdict(case))["rate"]

    def library(self) -> str:
        """Return the file of the fused_distill that the process imports."""
        return self._ask("library")["file"]

    def reset(self) -> None:
        """Forget prepared cases and compiled code."""
        self._ask("reset")

    def close(self) -> None:
        """Stop the child."""
        assert self._child.stdin
        with suppress(BrokenPipeError):  # of a child that ended before it read all
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
        self.inputs: Inputs | None = None  # of all prepared cases: they have the same shape
        self.steps: dict[str, Callable[[], Tensor | None]] = {}
        self.on_gpu = False

    def reset(self) -> dict[str, float]:
        import torch

        self.inputs = None
        self.steps.clear()
        torch.compiler.reset()
        self._free()
        return {}

    def prepare(self, key: str, inputs: str | None, **case_fields: Any) -> dict[str, float | None]:
        """Get the inputs, run a warm-up step, then measure the memory of a second one (not for the floor).

        extra_bytes is the peak beyond the memory in use before the step, including the two gradients
        (gradient_bytes). It is None where the system does not report it. The loss and the norms of the
        gradients show whether providers computed the same.
        """
        from providers import load_inputs, make_inputs, make_step

        case = Case(**case_fields)
        self.on_gpu = case.device == "cuda"
        if self.inputs is None:
            self.inputs = load_inputs(case, Path(inputs)) if inputs else make_inputs(case)
        step = self.steps[key] = make_step(self.provider, case, self.inputs)
        self._free()
        loss = step()
        if loss is None:
            return {}
        answer: dict[str, float | None] = {"loss": loss.item()}
        self._free()
        answer["extra_bytes"] = self._peak_of(step)
        gradients = [t.grad for t in self.inputs if t.grad is not None]
        answer["gradient_bytes"] = sum(g.nbytes for g in gradients)
        answer |= {f"gradient_norm_{i}": g.double().norm().item() for i, g in enumerate(gradients)}
        del gradients
        self._free()
        return answer

    def turn(self, key: str) -> dict[str, list[float]]:
        """Run two steps, then another two and time them, by CUDA events on a GPU.

        On a CPU the first two map the memory, which the process keeps until the end of its turn, because all
        processes together would need too much. Otherwise each step would write large tensors into new pages,
        whose page faults take part of its time, and much of it on a virtual machine that returns free memory.
        """
        keep_freed_memory(True)
        for _ in range(2):
            self.steps[key]()
        seconds = [self._seconds(self.steps[key]) for _ in range(2)]
        keep_freed_memory(False)
        self._free()
        return {"seconds": seconds}

    def peak(self, size: int, **case_fields: Any) -> dict[str, float]:
        from providers import peak_step

        case = Case(**case_fields)
        self.on_gpu = case.device == "cuda"
        step = peak_step(case, size)
        return {"rate": 2 * size**3 / min(self._seconds(step) for _ in range(4))}

    def library(self) -> dict[str, str]:
        import fused_distill

        return {"file": str(fused_distill.__file__)}

    def _free(self) -> None:
        """Free gradients and cached memory."""
        import torch

        for tensor in self.inputs or ():
            tensor.grad = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        elif sys.platform.startswith("linux"):
            ctypes.CDLL(None).malloc_trim(0)

    def _seconds(self, function: Callable[[], object]) -> float:
        import torch

        if not self.on_gpu:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def _peak_of(self, function: Callable[[], Tensor | None]) -> int | None:
        import torch

        if self.on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if not sys.platform.startswith("linux"):
            function()
            return None
        self._free()  # otherwise a step reuses heap memory of the previous one
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status_bytes("VmRSS")
        function()
        return status_bytes("VmHWM") - before


def keep_freed_memory(keep: bool) -> None:
    """Let glibc's malloc keep all freed memory for later allocations, or give back what is large."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names of malloc.h; a threshold of -1 is the largest
        mallopt(trim_threshold, -1 if keep else 128 << 10)
        mallopt(mmap_max, 0 if keep else 1 << 16)


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
