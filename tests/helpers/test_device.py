"""Tensors of tests are made on the device under test, those of the library where it says."""

from __future__ import annotations

from pathlib import Path

import device
import pytest
import torch
from fused_distill import fused_linear_jsd
from torch import nn

META = torch.device("meta")
TESTS = Path(__file__).parents[1]


def test_tensors_that_a_test_makes_are_moved_and_stay_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    with device.TensorsOnDevice(META):
        drawn = torch.randn(3, generator=generator, requires_grad=True)
        head = nn.Linear(3, 2)
        explicit = torch.zeros(2, device="cpu")
    assert drawn.device == head.weight.device == META
    assert drawn.is_leaf
    assert drawn.requires_grad
    assert explicit.device.type == "cpu"


def test_tensors_that_the_library_makes_are_not_moved() -> None:
    tensors = [torch.randn(size) for size in ((3, 4), (9, 4), (3, 5), (9, 5))]
    expected = fused_linear_jsd(*tensors, mask=torch.tensor([True, False, True]))
    mask = torch.tensor([True, False, True])
    with device.TensorsOnDevice(META):
        assert torch.equal(fused_linear_jsd(*tensors, mask=mask), expected)


@pytest.mark.parametrize("name", device.CPU_ONLY)
def test_tests_for_the_cpu_only_exist(name: str) -> None:
    file, _, function = name.partition("::")
    (path,) = TESTS.rglob(file)
    assert f"def {function}(" in path.read_text() or not function


@pytest.mark.parametrize(
    ("nodeid", "skipped"),
    [
        ("tests/chunked/test_gemm.py::test_products[cpu]", True),
        ("tests/parallel/test_vocab_shard.py::test_invalid_call_is_refused_on_every_rank[a/b]", True),
        ("tests/parallel/test_vocab_shard.py::test_identical_models_give_exactly_zero[0.5]", False),
        ("tests/test_linear_jsd.py::test_divergence_is_never_negative", False),
    ],
)
def test_tests_are_skipped_by_file_or_name(nodeid: str, skipped: bool) -> None:
    assert (device.why_cpu_only(nodeid) is not None) == skipped
