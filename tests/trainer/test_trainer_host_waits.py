"""The host does not wait for the device in each slice of a step: it reads numbers and times once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill import topk_logprobs, validation
from fused_distill.chunked import teacher as teacher_of_loss
from fused_distill.trainer.loop import Trainer
from fused_distill.trainer.metrics import Timer
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import NOT_INTERPRETED, Lab
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED
aten = torch.ops.aten


class HostReads(TorchDispatchMode):
    """Counts the operations called by this library whose results the host must have before it goes on."""

    OPERATIONS = (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.by_line = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: Any = sys._getframe(1)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        # transformers compares padding masks in every forward pass, AdamW reads step counters of the CPU.
        library = "/fused_distill/" in frame.f_code.co_filename and frame.f_code.co_name != "_is_one_on_cpu"
        if func.overloadpacket in self.OPERATIONS and library:
            self.by_line[f"{frame.f_code.co_filename}:{frame.f_lineno} {func}"] += 1
        return func(*args, **(kwargs or {}))


def counted(method: Any, calls: list[str]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(method.__name__)
        return method(*arguments, **options)

    return call


def reads_of_a_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    """Return the reads of an update by line, without those of making batches, and the calls of tolist."""
    lists: list[int] = []
    messages: list[str] = []  # to the other processes
    tolist = torch.Tensor.tolist
    buffer = trainer.fill_buffer()
    with HostReads() as mode, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(1), tolist(self))[1])
        for name in ("gather", "reduce"):
            patch.setattr(trainer.accelerator, name, counted(getattr(trainer.accelerator, name), messages))
        trainer.update(buffer)
    assert messages == ["reduce", "gather"]  # the number of tokens before the first slice, then all metrics
    # Batches are made of tensors in the memory of the host.
    return Counter({line: n for line, n in mode.by_line.items() if "/data.py:" not in line}), len(lists)


@pytest.mark.parametrize("targets", ["full", "topk", "student_topk"])
def test_a_step_reads_from_the_device_as_often_for_four_slices_as_for_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    # On a CUDA device these checks are assertions on the device.
    monkeypatch.setattr(validation, "_require_all", lambda *_: None)
    for module in (teacher_of_loss, sys.modules[topk_logprobs.__module__]):
        monkeypatch.setattr(module, "check_id_range", lambda *_, **__: None)
    settings = ["rollouts.importance_clip=2", "lmbda=0.5"]
    k = "" if targets == "full" else ", k: 4"
    settings.append(f"teacher={{model: {lab.teacher}, targets: {targets}{k}}}")
    for slices in (1, 4):
        trainer = Trainer(lab.config(tmp_path, f"gradient_accumulation_steps={slices}", *settings))
        reads, lists = reads_of_a_step(trainer, monkeypatch)
        assert reads.total() == 1, reads  # the number of tokens, before the first slice
        assert lists == 1  # loss, statistics and gradient norm together


class FakeEvent:
    """A CUDA event that is recorded at times of a fake clock and may be read only after a wait."""

    clock = 0.0
    waits = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.reached = False

    def record(self) -> None:
        self.time = FakeEvent.clock

    def synchronize(self) -> None:
        FakeEvent.waits += 1
        self.reached = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.reached
        return (end.time - self.time) * 1000


def test_times_on_a_cuda_device_come_from_events_that_are_waited_for_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = Timer(torch.device("cuda"))
    for name, seconds in (("rollout", 2.0), ("teacher", 0.5), ("teacher", 0.25)):
        with timer.measure(name):
            FakeEvent.clock += seconds
        FakeEvent.clock += 8
    assert FakeEvent.waits == 0
    assert timer.read() == {"rollout": 2.0, "teacher": 0.75}
