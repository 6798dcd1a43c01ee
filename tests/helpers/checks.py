"""What the property tests of both losses share: how many examples, and how close is close."""

from __future__ import annotations

import torch
from cases import BACKEND, INTERPRETED, Answer, Case
from hypothesis import settings
from torch import Tensor

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
FLOAT32_EPS = torch.finfo(torch.float32).eps

with_examples = settings(max_examples=12 if INTERPRETED else 80)
with_few_examples = settings(max_examples=5 if INTERPRETED else 25)


def assert_close(got: Tensor | None, want: Tensor | None, relative: float, absolute: float = 1e-6) -> None:
    """Distance in norm, relative to the norm, with a floor for values that are nearly 0."""
    assert (got is None) == (want is None)
    if got is None or want is None:
        return
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= relative * size + absolute, (
        f"relative error {error / max(size, 1e-300):.2e}, size {size:.2e}"
    )


def check_float32(case: Case) -> None:
    """Loss and gradients within three times the error of the float32 reference."""
    assert_as_exact_as_float32(case.answer(BACKEND), case)


def assert_as_exact_as_float32(got: Answer, case: Case) -> None:
    """`got` answers the case within three times the error of the float32 reference."""
    want, naive = case.oracle(), case.answer("reference")
    for mine, true, plain in zip(
        (got.loss, *got.grads), (want.loss, *want.grads), (naive.loss, *naive.grads), strict=True
    ):
        assert mine is not None
        assert true is not None
        assert plain is not None
        allowed = (
            3 * (plain.double() - true).norm().item()
            + 20 * FLOAT32_EPS * true.norm().item()
            + 4 * FLOAT32_EPS
        )
        assert (mine.double() - true).norm().item() <= allowed


def check_half(case: Case) -> None:
    """Gradients of half inputs as good as the exact ones rounded once."""
    got, want = case.answer(BACKEND), case.oracle()
    assert_close(got.loss, want.loss, 1e-5, 1e-5)
    for mine, true in zip(got.grads, want.grads, strict=True):
        assert mine is not None
        assert true is not None
        rounded = true.to(mine.dtype).double()
        allowed = (rounded - true).norm().item() * 1.1 + 1e-5 * true.norm().item() + 1e-6
        assert (mine.double() - true).norm().item() <= allowed


def check_float64(case: Case) -> None:
    """float64 inputs computed in float64."""
    got, want = case.answer(BACKEND), case.oracle()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert mine is not None
        assert mine.dtype == torch.float64
        assert_close(mine, true, 1e-10, 1e-12)
