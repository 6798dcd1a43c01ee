"""The library of float32 products on a CPU: how it is chosen, and results and memory with either."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd, reference
from fused_distill.chunked import cpu_product as cpu_product_module
from fused_distill.chunked.cpu_product import VARIABLE, cpu_product, onednn_mm
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


@pytest.fixture(autouse=True)
def not_yet_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test choose anew, and leave no choice behind."""
    monkeypatch.delenv(VARIABLE, raising=False)
    cpu_product_module._choose.cache_clear()
    yield
    cpu_product_module._choose.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[None]]:
    """Return a function that pretends the libraries' seconds and returns the list of measurements."""

    def pretend(torch_seconds: float, onednn_seconds: float) -> list[None]:
        calls: list[None] = []

        def measure() -> tuple[float, float]:
            calls.append(None)
            return torch_seconds, onednn_seconds

        monkeypatch.setattr(cpu_product_module, "_onednn_works", lambda: True)
        monkeypatch.setattr(cpu_product_module, "_measure", measure)
        return calls

    return pretend


@pytest.mark.parametrize(
    ("torch_seconds", "onednn_seconds", "library"),
    [(2e-3, 1e-3, "onednn"), (1.1e-3, 1e-3, "torch"), (1e-3, 2e-3, "torch")],
)
def test_onednn_is_chosen_if_it_was_clearly_faster(
    measured: Callable[[float, float], list[None]], torch_seconds: float, onednn_seconds: float, library: str
) -> None:
    measured(torch_seconds, onednn_seconds)
    assert cpu_product().library == library


def test_products_are_measured_once(measured: Callable[[float, float], list[None]]) -> None:
    calls = measured(1.0, 1.0)
    assert cpu_product() == cpu_product()
    assert len(calls) == 1


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_the_environment_variable_decides_without_a_measurement(
    monkeypatch: pytest.MonkeyPatch, measured: Callable[[float, float], list[None]], library: str
) -> None:
    calls = measured(1.0, 1.0)
    monkeypatch.setenv(VARIABLE, library)
    assert cpu_product().library == library
    assert not calls


def test_an_unknown_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mkl")
    with pytest.raises(ValueError, match="FUSED_DISTILL_CPU_PRODUCT must be torch or onednn, got 'mkl'"):
        cpu_product()


def test_onednn_is_refused_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_product_module, "_onednn_works", lambda: False)
    monkeypatch.setenv(VARIABLE, "onednn")
    with pytest.raises(ValueError, match="no oneDNN product"):
        cpu_product()
    monkeypatch.delenv(VARIABLE)
    assert cpu_product().library == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        assert cpu_product_module._onednn_works()
        assert all(seconds > 0 for seconds in cpu_product_module._measure())
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_measurement_is_not_seen_by_the_callers_modes() -> None:
    with FlopCounterMode(display=False) as flops, torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        cpu_product()
    assert flops.get_total_flops() == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_loss_and_gradients_by_onednn_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "onednn")
    products = 0

    def counted(a: Tensor, b: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return onednn_mm(a, b)

    monkeypatch.setattr("fused_distill.chunked.gemm.onednn_mm", counted)
    generator = torch.Generator().manual_seed(0)
    sizes = ((30, 8), (50, 8), (30, 6), (50, 6))
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    grads = {}
    for loss in (fused_linear_jsd, reference.linear_jsd):
        hidden, weight = (t.clone().requires_grad_() for t in tensors[:2])
        value = loss(hidden, weight, *tensors[2:], beta=0.5)
        value.backward()
        grads[loss] = (value.detach().float(), hidden.grad, weight.grad)
    assert products >= 4
    for ours, expected in zip(grads[fused_linear_jsd], grads[reference.linear_jsd], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
