"""FUSED_DISTILL_TEST_DEVICE chooses the device of the tests' tensors and the backend under test."""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import pytest
import torch


def test_device_is_the_cpu_by_default() -> None:
    assert cases.device_named(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["meta", "gpu", ""])
def test_device_without_kernels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="FUSED_DISTILL_TEST_DEVICE must be cpu, cuda or"):
        cases.device_named(name)


def test_tensors_are_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", torch.device("meta"))
    weight, hidden = torch.ones(7, 4), torch.ones(3, 4)
    case = cases.Case((hidden, weight, hidden, weight), {"mask": torch.ones(3, dtype=torch.bool)})
    case = case.to(torch.float64).with_options(beta=0.1)
    assert {t.device.type for t in (*case.tensors, *case.keyword_tensors.values())} == {"meta"}


@pytest.mark.parametrize(
    ("name", "device", "backend"),
    [("cpu", "cpu", "cpp"), ("cuda", "cuda", "triton"), ("emulated-cuda", "cpu", "torch")],
)
def test_variable_sets_device_and_backend(name: str, device: str, backend: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "FUSED_DISTILL_TEST_DEVICE": name,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(cases.__file__), *filter(None, sys.path)]),
    }
    code = "import cases; print(cases.DEVICE, cases.BACKEND)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == [device, backend]
