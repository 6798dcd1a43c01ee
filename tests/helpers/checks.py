"""Assertions that the property tests of both losses share, and how many examples they draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EMULATED_GPU, HALF, INTERPRETED, Case, LossResult
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
# Options of each divergence with arithmetic of its own.
DIVERGENCES: dict[str, dict[str, Any]] = {
    **{f"jsd-{beta}": {"beta": beta} for beta in BETAS},
    **{name: {"divergence": name, "alpha": 0.2} for name in ("skew_forward_kl", "skew_reverse_kl")},
    "mixed_kl": {"divergence": "mixed_kl", "reverse_weight": 0.3},
    "total_variation": {"divergence": "total_variation"},
}
for_each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
some_divergence = st.sampled_from(list(DIVERGENCES.values()))
TAILS = ["bucket", "renormalize", "truncate"]
for_each_tail_and_divergence = pytest.mark.parametrize(
    ("tail", "divergence"),
    [
        pytest.param(tail, options, id=f"{tail}-{name}")
        for tail in TAILS
        for name, options in DIVERGENCES.items()
        if tail != "truncate" or name.startswith("jsd")
    ],
)
FLOAT32_EPS = torch.finfo(torch.float32).eps

with_examples = settings(max_examples=12 if INTERPRETED else 80)
with_few_examples = settings(max_examples=5 if INTERPRETED else 25)

# Half-precision gradients of a GPU are rounded twice, as logit gradients and as those of the inputs.
# Where a few labels dominate a weight gradient, its own rounding may be small by chance.
GPU_ROUNDINGS = 4.0 if EMULATED_GPU else 0.0
_FEW = 64  # numbers


def finite_where_forbidden(by: str, divergence: dict[str, Any]) -> dict[str, Any]:
    """Return options of a divergence whose loss is finite where one model alone, "teacher" or "student",
    forbids a token: the KL divergence that would be infinite has weight 0 or is clipped.
    """
    infinite_beta = 1.0 if by == "teacher" else 0.0
    if "reverse_weight" in divergence:
        return {**divergence, "reverse_weight": 1 - infinite_beta}
    return {**divergence, "entry_clip": 0.3} if divergence.get("beta") == infinite_beta else divergence


def assert_close(
    actual: Tensor | None, expected: Tensor | None, relative: float, absolute: float = 1e-6
) -> None:
    """Check the norm of the difference against the norm of `expected`, and a floor for values near 0.

    Through an emulated GPU, four roundings more are allowed to half-precision gradients.
    """
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    absolute += GPU_ROUNDINGS * rounding_of(expected, actual.dtype)
    assert error <= relative * size + absolute, (
        f"relative error {error / max(size, 1e-300):.2e}, size {size:.2e}"
    )


def rounding_of(exact: Tensor, dtype: torch.dtype) -> float:
    """Return the norm of the error of rounding to a half dtype, 0 for others.

    For a tensor that has been rounded itself, or whose few numbers may lose nothing by chance, it is the
    largest error of numbers of this size.
    """
    if dtype not in HALF:
        return 0.0
    largest = torch.finfo(dtype).eps / 2 * exact.double().norm().item()
    rounding = (exact.to(dtype).double() - exact.double()).norm().item()
    return max(rounding, largest) if exact.dtype == dtype or exact.numel() < _FEW else rounding


def assert_results_close(
    actual: LossResult, expected: LossResult, relative: float, absolute: float = 1e-6
) -> None:
    """Compare losses and gradients."""
    for a, e in zip((actual.loss, *actual.grads), (expected.loss, *expected.grads), strict=True):
        assert_close(a, e, relative, absolute)


def assert_results_equal(actual: LossResult, expected: LossResult) -> None:
    """Compare losses and gradients bit by bit."""
    for a, e in zip((actual.loss, *actual.grads), (expected.loss, *expected.grads), strict=True):
        assert a is not None
        assert e is not None
        assert torch.equal(a, e)


def assert_stats_close(
    actual: LossResult, expected: LossResult, relative: float = 1e-5, absolute: float = 1e-5
) -> None:
    """Compare statistics; near ties of the most likely token may fall either way."""
    for name in expected.stats._fields:
        a, e = getattr(actual.stats, name), getattr(expected.stats, name)
        if name == "top1_agreement":
            assert a.dtype == torch.bool
            assert (a == e).double().mean() > 0.9
        else:
            assert_close(a, e, relative, absolute)


def assert_zero(result: LossResult) -> None:
    """Check that loss and gradients are exactly 0."""
    assert (result.loss == 0).all()
    assert all(g is not None and (g == 0).all() for g in result.grads)


def check_float32(case: Case) -> None:
    """Check the backend under test by `assert_as_exact_as_float32`."""
    assert_as_exact_as_float32(case.run(), case)


def assert_as_exact_as_float32(result: LossResult, case: Case) -> None:
    """Check that loss and gradients have at most three times the error of the float32 reference."""
    oracle, naive = case.oracle(), case.run("reference")
    for actual, exact, plain in zip(
        (result.loss, *result.grads), (oracle.loss, *oracle.grads), (naive.loss, *naive.grads), strict=True
    ):
        assert actual is not None
        assert exact is not None
        assert plain is not None
        allowed = (
            3 * (plain.double() - exact).norm().item()
            + 20 * FLOAT32_EPS * exact.norm().item()
            + 4 * FLOAT32_EPS
            + GPU_ROUNDINGS * rounding_of(exact, actual.dtype)
        )
        assert (actual.double() - exact).norm().item() <= allowed


def check_half(case: Case) -> None:
    """Check the backend under test by `assert_rounded_once`."""
    assert_rounded_once(case.run(), case.oracle())


def assert_rounded_once(result: LossResult, oracle: LossResult) -> None:
    """Check that gradients of half inputs are as good as exact ones that are rounded once."""
    assert_close(result.loss, oracle.loss, 1e-5, 1e-5)
    for actual, exact in zip(result.grads, oracle.grads, strict=True):
        assert actual is not None
        assert exact is not None
        once = (exact.to(actual.dtype).double() - exact).norm().item()
        assert_close(actual, exact, 1e-5, (0.0 if EMULATED_GPU else 1.1 * once) + 1e-6)


def check_float64(case: Case) -> None:
    """Check that float64 inputs are computed in float64."""
    result = case.run()
    assert all(t is not None and t.dtype == torch.float64 for t in (result.loss, *result.grads))
    assert_results_close(result, case.oracle(), 1e-10, 1e-12)
