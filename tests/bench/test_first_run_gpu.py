"""The checks of a first run on a GPU, run at tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED
from first_run_checks import Check, CheckResult, Setting
from first_run_gpu import can_go_on, report, run
from gpu_correctness import products
from gpu_speed import alarms
from launches import half_products_on_the_cpu

ROOT = Path(__file__).resolve().parents[2]
SMALL = Setting(torch.device("cpu"), small=True)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the PyTorch backend")


def test_every_check_that_needs_no_gpu_passes_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "first-run.json"
    script = ROOT / "bench" / "first_run_gpu.py"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--small", "--output", output],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {outcome["check"]: outcome["status"] for outcome in json.loads(output.read_text())["outcomes"]}
    assert {name for name, status in statuses.items() if status != "ok"} == {
        "no wait for the GPU in a call without a mask",
        "memory within workspace_bytes, and no allocation from step to step",
        "CUDA graph of a call without a mask",
        "second device, while the first is the current one",
    }
    assert set(statuses.values()) == {"ok", "skipped"}


def test_a_check_that_raises_is_recorded_as_an_error() -> None:
    def fails(setting: Setting) -> CheckResult:
        raise ZeroDivisionError("no time")

    outcome = run(Check("fails", False, fails), SMALL)
    assert outcome["status"] == "error"
    assert outcome["reason"] == "ZeroDivisionError: no time"
    assert "test_first_run_gpu.py" in outcome["traceback"]


def test_a_check_that_leaves_the_gpu_useless_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    setting = Setting(torch.device("cuda"), small=True)
    outcome = run(Check("reads beyond its tensor", True, lambda setting: CheckResult()), setting)
    assert outcome["status"] == "error"
    assert outcome["reason"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not can_go_on(setting)


def test_a_problem_is_recorded_and_reported() -> None:
    def wrong(setting: Setting) -> CheckResult:
        result = CheckResult([{"ratio": 1.23456}])
        result.expect(False, "too slow")
        return result

    outcome = run(Check("speed", False, wrong), SMALL)
    assert outcome["status"] == "problem"
    assert report([outcome]).splitlines()[1:] == ["    ! too slow", "      ratio 1.235"]


@pytest.mark.parametrize(
    "name",
    [
        "ampere_sgemm_128x64_tn",
        "cutlass_gemm_bf16_align1",
        "cublasLt::splitKreduce_kernel",
        "Memcpy DtoH (Device)",
    ],
)
def test_slow_kernels_and_copies_raise_an_alarm(name: str) -> None:
    (alarm,) = alarms([(name, 3), ("nvjet_tst_128x256_align16", 4)], n_chunks=1)
    assert alarm.startswith(f"{name} (3 launches): ")


def test_too_many_kernels_per_chunk_raise_an_alarm() -> None:
    assert alarms([("divergence_kernel", 40), ("Memset", 9)], n_chunks=2) == []
    assert alarms([("divergence_kernel", 41)], n_chunks=2) == [
        "41 kernels for 2 chunks: more than 20 per chunk"
    ]


def test_products_are_compared_with_float64() -> None:
    with half_products_on_the_cpu():
        result = products(SMALL)
    assert result.problems == []
    errors = [row["gradient"] for row in result.rows if "gradient" in row]
    assert len(errors) == 4
    assert all(0 < error < 1e-5 for error in errors)
