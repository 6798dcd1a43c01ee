"""Close models, where naive float32 has no correct digit: rows against float64 on the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from fused_distill._rows import row_divergence
from fused_distill._settings import LossSettings
from torch import Tensor

if INTERPRETED:
    from fused_distill._rows_triton import row_divergence as rows_under_test
else:
    rows_under_test = row_divergence

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
# Relative error allowed at each distance between the models.
ALLOWED = {1e-2: 1e-5, 1e-3: 1e-5, 1e-4: 1e-4, 1e-5: 1e-3}


def close_logits(noise: float, rows: int = 2, vocab: int = 32000) -> tuple[Tensor, Tensor]:
    """Student's and teacher's float32 logits of size about 10."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    return teacher + noise * torch.randn(rows, vocab, generator=generator), teacher


def loss_and_grad(
    rows: Any, student: Tensor, teacher: Tensor, beta: float, **options: Any
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(student)
    weight = torch.ones(len(student), dtype=student.dtype)
    result = rows(student, teacher, weight, LossSettings(beta=beta), grad=grad, **options)
    return result.loss, grad


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("noise", ALLOWED)
def test_close_models_keep_their_digits(noise: float, beta: float) -> None:
    student, teacher = close_logits(noise)
    loss, grad = loss_and_grad(rows_under_test, student, teacher, beta)
    true_loss, true_grad = loss_and_grad(row_divergence, student.double(), teacher.double(), beta)
    assert relative_error(loss, true_loss) < ALLOWED[noise]
    assert relative_error(grad, true_grad) < ALLOWED[noise]
    assert (loss >= 0).all()


@pytest.mark.skipif(INTERPRETED, reason="about the float64 oracle")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("noise", [1e-2, 1e-5, 1e-7])
def test_the_float64_oracle_agrees_with_fifty_digits(noise: float, beta: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    student, teacher = (t.double() for t in close_logits(noise, rows=1, vocab=50))
    with mpmath.workdps(50):
        p_s, p_t = (softmax(mpmath, logits[0].tolist()) for logits in (student, teacher))
        b = mpmath.mpf(beta)
        m = [b * t + (1 - b) * s for s, t in zip(p_s, p_t, strict=True)]
        kl_t, kl_s = (sum(a * mpmath.log(a / c) for a, c in zip(p, m, strict=True)) for p in (p_t, p_s))
        kl_ts = sum(t * mpmath.log(t / s) for s, t in zip(p_s, p_t, strict=True))
        kl_st = sum(s * mpmath.log(s / t) for s, t in zip(p_s, p_t, strict=True))
        want = float(kl_ts if beta == 0 else kl_st if beta == 1 else b * kl_t + (1 - b) * kl_s)
    loss, _ = loss_and_grad(row_divergence, student, teacher, beta)
    assert loss.item() == pytest.approx(want, rel=1e-7)


def softmax(mpmath: Any, logits: list[float]) -> list[Any]:
    exponentials = [mpmath.exp(mpmath.mpf(z)) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.skipif(INTERPRETED, reason="about torch.compile")
@pytest.mark.parametrize("beta", BETAS)
def test_compiled_rows_keep_the_same_digits(beta: float) -> None:
    student, teacher = close_logits(1e-4)
    loss, grad = loss_and_grad(row_divergence, student, teacher, beta, compiled=True)
    true_loss, true_grad = loss_and_grad(row_divergence, student.double(), teacher.double(), beta)
    assert relative_error(loss, true_loss) < ALLOWED[1e-4]
    assert relative_error(grad, true_grad) < ALLOWED[1e-4]


@pytest.mark.skipif(INTERPRETED, reason="about the projections, which every backend shares")
@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_inputs_are_not_rounded_to_bfloat16_logits(beta: float) -> None:
    # After linkedin/Liger-Kernel issue 1432, at a quarter of its sizes and with logits of size 8.
    generator = torch.Generator().manual_seed(0)
    hs, ht = (torch.randn(64, 1024, generator=generator).bfloat16() for _ in range(2))
    ws, wt = (torch.randn(8000, 1024, generator=generator).div(4).bfloat16() for _ in range(2))
    hs.requires_grad_()
    fused_linear_jsd(hs, ws, ht, wt, beta=beta).backward()
    exact = hs.detach().double().requires_grad_()
    fused_linear_jsd(exact, ws.double(), ht.double(), wt.double(), beta=beta).backward()
    assert hs.grad is not None
    assert exact.grad is not None
    assert relative_error(hs.grad, exact.grad) < 2**-8

    student, teacher = (
        (hs.detach() @ ws.T).float(),
        (ht @ wt.T).float(),
    )  # rounded, as a bfloat16 head gives them
    _, grad = loss_and_grad(row_divergence, student, teacher, beta)
    rounded = grad.double() @ ws.double() / len(hs)
    assert relative_error(rounded, exact.grad) > 4 * relative_error(hs.grad, exact.grad)
