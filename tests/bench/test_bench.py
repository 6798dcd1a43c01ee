"""The benchmark suite: providers agree, result files are reproducible, and tables follow from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from cases import INTERPRETED
from fused_distill import reference
from providers import FLOOR, LOSSES, Case, make_inputs, make_step
from worker import ProviderFailed, Worker

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ["fused-distill", "fused-distill, torch", "Liger chunked", "TRL", "naive"]
CASE = Case(tokens=40, vocab=300, student_dim=16, teacher_dim=24)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs providers without the interpreter")


def bench(script: str, output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "bench" / script, "--small", "--output", output, *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # as from a shell
    environment["TORCH_COMPILE_DISABLE"] = "1"  # Liger's compilations take most of the time of a tiny run
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=output.parent, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("tail", ["bucket", "truncate", "renormalize"])
def test_top_k_providers_compute_the_same_loss_and_gradients(tail: str, beta: float) -> None:
    case = replace(CASE, teacher_dim=0, k=8)
    peer = "verl, truncate" if tail == "truncate" else f"TRL, {tail}"
    if tail == "truncate" and beta:
        with pytest.raises(ValueError, match="forward KL only"):
            LOSSES[peer](beta)
        return
    inputs, peer_inputs = make_inputs(case), make_inputs(case)
    loss = LOSSES[f"fused-distill, {tail}"](beta)(*inputs)
    peer_loss = LOSSES[peer](beta)(*peer_inputs)
    loss.backward()
    peer_loss.backward()
    assert loss.item() == pytest.approx(peer_loss.item(), rel=1e-5)
    for tensor, peer_tensor in zip(inputs[:2], peer_inputs[:2], strict=True):
        torch.testing.assert_close(tensor.grad, peer_tensor.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("provider", ON_CPU)
def test_providers_compute_what_the_float64_reference_computes(provider: str, beta: float) -> None:
    expected, inputs = make_inputs(CASE), make_inputs(CASE)
    hs, ws, ht, wt = (t.double() for t in expected)
    expected_loss: Any = reference.linear_jsd(hs, ws, ht, wt, beta=beta)
    expected_loss.backward()
    # Liger's loss takes seconds to compile for each beta: one suffices.
    with torch.compiler.set_stance("default" if beta == 0.5 else "force_eager"):
        loss = LOSSES[provider](beta)(*inputs)
        loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for tensor, expected_tensor in zip(inputs[:2], expected[:2], strict=True):
        torch.testing.assert_close(tensor.grad, expected_tensor.grad, rtol=1e-3, atol=1e-6)


def test_the_floor_is_the_four_or_three_products() -> None:
    step = make_step(FLOOR, CASE, make_inputs(CASE))
    topk = replace(CASE, teacher_dim=0, k=8)
    topk_step = make_step(FLOOR, topk, make_inputs(topk))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
        topk_step()
    shapes = [event.input_shapes[:2] for event in seen.events() or [] if event.name == "aten::mm"]
    student, teacher = [[40, 16], [16, 300]], [[40, 24], [24, 300]]
    gradients = [[[40, 300], [300, 16]], [[300, 40], [40, 16]]]
    assert shapes == [student, teacher, *gradients, student, *gradients]


def test_a_cpu_run_appends_rows_with_machine_versions_commit_and_command(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text('{"runs": [{"date": "earlier"}]}')
    earlier, run = bench("cpu.py", tmp_path / "cpu.json", "full", "--only", "floor|naive")["runs"]
    assert earlier == {"date": "earlier"}
    assert {row["provider"] for row in run["rows"]} == {"floor", "naive"}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in run["rows"])
    assert run["part"] == "full"
    assert not run["complete"]  # --only leaves rows out
    assert run["peak"]["torch.mm"] > 0
    assert run["machine"]["cpu"]
    assert run["versions"]["torch"] == torch.__version__
    assert run["commit"]
    assert run["command"].startswith("python bench/cpu.py --small")


def test_a_gpu_run_takes_the_triton_path_and_records_errors(tmp_path: Path) -> None:
    (run,) = bench("gpu.py", tmp_path / "gpu.json", "full", "--only", "(triton|Liger Triton).*N8-")["runs"]
    rows = {(row["provider"], row["beta"]): row for row in run["rows"]}
    assert rows["fused-distill, triton", 0.5]["loss"] > 0
    assert len(rows) == 6
    assert all(row.get("seconds") or row["error"] for row in run["rows"])


def test_phases_of_the_trainer_stand_beside_their_parts_run_alone(tiny_model: Path, tmp_path: Path) -> None:
    content = bench("phases.py", tmp_path / "phases.json", "--model", str(tiny_model))
    assert all(min(round_.values()) > 0 for round_ in content["seconds"])
    text = report.table(content)
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if "|" in line}
    step = [*lines][2:-2]
    assert step == ["rollouts", "teacher", "student"]
    assert sum(int(lines[name][1].strip(" %")) for name in step) == pytest.approx(100, abs=2)
    assert "optimizer" in lines["student"][2]
    assert [*lines][-2:] == ["whole step", "evaluation"]


def test_numerics_beat_naive_float32_on_close_models(tmp_path: Path) -> None:
    rows = bench("numerics.py", tmp_path / "numerics.json")["rows"]
    closest = [row for row in rows if "noise 1e-05" in row["case"] and "loss" in row["table"]]
    errors = {
        name: max(r["error"] for r in closest if r["provider"] == name) for name in ("fused-distill", "naive")
    }
    assert errors["fused-distill"] < 1e-3 < errors["naive"]


def test_peak_memory_is_that_of_the_allocations_of_a_step() -> None:
    worker = Worker("naive")
    try:
        case = Case(tokens=512, vocab=8192, student_dim=8, teacher_dim=8)
        logits = 4 * case.tokens * case.vocab
        extra = worker.prepare("key", case)["extra_bytes"]
        assert extra is not None
        assert 3 * logits < extra < 30 * logits
    finally:
        worker.close()


def test_an_exception_of_a_provider_reaches_the_parent() -> None:
    worker = Worker("fused-distill, triton")
    try:
        with pytest.raises(ProviderFailed, match="backend='triton' needs tensors on a CUDA or ROCm device"):
            worker.prepare("key", CASE)
    finally:
        worker.close()


def test_the_end_of_a_providers_process_reaches_the_parent() -> None:
    worker = Worker("no such provider")
    worker._child.kill()
    with pytest.raises(ProviderFailed, match="process ended with status -9"):
        worker.prepare("key", CASE)
