"""The loss as an autograd function: gradcheck, repeated and scaled backward passes, autocast."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE
from fused_distill import fused_linear_jsd
from fused_distill.config import Reduction
from torch import Tensor


def tensors(
    dtype: torch.dtype = torch.float32, n: int = 6, vocab: int = 40
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return randn(n, 8).requires_grad_(), randn(vocab, 8).requires_grad_(), randn(n, 5), randn(vocab, 5)


def gradients(loss: Tensor, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, **options)


def assert_close(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("extras", [False, True])
def test_gradients_pass_gradcheck(beta: float, reduction: Reduction, extras: bool) -> None:
    hs, ws, ht, wt = tensors(torch.float64, n=3, vocab=7)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"beta": beta, "reduction": reduction}
    if extras:
        options |= {
            "student_softcap": 3.0,
            "temperature": 0.8,
            "labels": torch.tensor([1, -100, 6]),
            "hard_weight": 0.5,
        }

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_jsd(hidden, weight, ht, wt, student_bias=bias, backend="torch", **options)

    assert torch.autograd.gradcheck(loss, (hs, ws, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_pass_gives_the_same_gradients(reduction: Reduction) -> None:
    hs, ws, ht, wt = tensors()
    loss = fused_linear_jsd(hs, ws, ht, wt, reduction=reduction).sum()
    assert_close(gradients(loss, hs, ws, retain_graph=True), gradients(loss, hs, ws))


def with_watched_memory(tensor: Tensor) -> tuple[Tensor, weakref.ref[np.ndarray]]:
    """Return a copy of the tensor, and a reference that is dead once nothing holds the copy's memory."""
    memory = tensor.numpy().copy()
    return torch.from_numpy(memory), weakref.ref(memory)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_backward_pass_releases_the_teachers_tensors(reduction: Reduction) -> None:
    """The caller's loss often lives until the next step's loss replaces it."""
    hs, ws, *teacher = tensors()
    (ht, hidden_memory), (wt, weight_memory) = map(with_watched_memory, teacher)
    loss = fused_linear_jsd(hs, ws, ht, wt, reduction=reduction)
    del ht, wt
    loss.sum().backward(retain_graph=True)
    assert hidden_memory() is not None
    assert weight_memory() is not None
    loss.sum().backward()
    assert loss.isfinite().all()
    assert hidden_memory() is None
    assert weight_memory() is None


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_backward_pass_through_a_freed_graph_is_refused(reduction: Reduction) -> None:
    hs, ws, ht, wt = tensors()
    loss = fused_linear_jsd(hs, ws, ht, wt, reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_normalizer_that_goes_on_counting_does_not_change_the_second_gradients() -> None:
    hs, ws, ht, wt = tensors()
    count = torch.tensor(4.0)
    loss = fused_linear_jsd(hs, ws, ht, wt, normalizer=count)
    first = gradients(loss, hs, ws, retain_graph=True)
    count += 4
    assert_close(first, gradients(loss, hs, ws))


def test_scaled_loss_scales_the_gradients() -> None:
    hs, ws, ht, wt = tensors()
    plain = gradients(fused_linear_jsd(hs, ws, ht, wt), hs, ws)
    scaled = gradients(1024 * fused_linear_jsd(hs, ws, ht, wt), hs, ws)
    assert_close(scaled, tuple(1024 * g for g in plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradients_is_the_same(mode: Any) -> None:
    hs, ws, ht, wt = tensors()
    expected = fused_linear_jsd(hs, ws, ht, wt)
    with mode():
        actual = fused_linear_jsd(hs, ws, ht, wt)
    assert not actual.requires_grad
    assert torch.equal(actual, expected.detach())


def test_loss_and_gradients_under_autocast_are_float32() -> None:
    hs, ws, ht, wt = tensors()
    expected = fused_linear_jsd(hs, ws, ht, wt)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = fused_linear_jsd(hs, ws, ht, wt)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(g.dtype == torch.float32 for g in gradients(actual, hs, ws))


def test_bfloat16_hidden_states_with_a_float32_head_equal_float32() -> None:
    hs, ws, ht, wt = tensors()
    rounded = hs.detach().bfloat16()
    expected = fused_linear_jsd(rounded.float(), ws, ht, wt)
    assert fused_linear_jsd(rounded, ws, ht, wt).item() == pytest.approx(expected.item(), rel=1e-6)
