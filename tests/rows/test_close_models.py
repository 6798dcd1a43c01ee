"""Close models, for which naive float32 keeps no correct digit of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKEND, Case, close_logits
from checks import for_each_divergence
from fused_distill import fused_linear_jsd, reference
from fused_distill.config import LossConfig
from fused_distill.parallel.vocab_shard import ShardGroup
from fused_distill.rows.backend import make_row_loss
from fused_distill.rows.base import RowLoss, StudentRows, TeacherRows
from fused_distill.rows.full_torch import TorchJSD
from long_double import divergence_rows
from torch import Tensor

ROW_LOSS: RowLoss = make_row_loss(BACKEND, LossConfig(), None, "cpu")

needs_no_kernel = pytest.mark.skipif(BACKEND == "triton", reason="runs no kernel")

# Largest relative error for each distance between the models.
TOLERANCE = {1e-2: 1e-5, 1e-3: 1e-5, 1e-4: 1e-4, 1e-5: 1e-3}


def student_rows(
    logits: Tensor, bias: Tensor | None, divergence: dict[str, Any], **options: Any
) -> tuple[StudentRows, LossConfig]:
    """Return rows of weight 1, and the options of their loss."""
    options = {**divergence, **options}
    mix, weight = options.pop("reverse_weight", None), torch.ones_like(logits[:, 0])
    reverse_weight = None if mix is None else mix * weight
    return StudentRows(logits, weight, bias, reverse_weight=reverse_weight), LossConfig(**options)


def loss_and_grad(
    row_loss: RowLoss, student: Tensor, teacher: Tensor, divergence: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the losses and logit gradients of a row loss."""
    grad = torch.empty_like(student)
    rows, config = student_rows(student, None, divergence)
    rows = rows._replace(logits=rows.logits.clone())  # both models' logits may be overwritten
    teacher_rows = TeacherRows(teacher.clone())
    result = row_loss(rows, teacher_rows, config, grad=grad, group=ShardGroup(), block_rows=None)
    return result.loss, grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected.cpu()).norm() / expected.norm()).item()


@for_each_divergence
@pytest.mark.parametrize("noise", TOLERANCE)
def test_loss_and_gradient_keep_their_digits(noise: float, divergence: dict[str, Any]) -> None:
    student, teacher = close_logits(noise)
    loss, grad = loss_and_grad(ROW_LOSS, student, teacher, divergence)
    exact_loss, exact_grad = divergence_rows(student, teacher, **divergence)
    assert relative_error(loss, exact_loss) < TOLERANCE[noise]
    assert relative_error(grad, exact_grad) < TOLERANCE[noise]
    assert (loss >= 0).all()


@pytest.mark.parametrize("share", [0.01, 1e9], ids=["the largest terms", "no term"])
@for_each_divergence
def test_clipping_keeps_the_digits(divergence: dict[str, Any], share: float) -> None:
    noise = 1e-4
    divergence = {**divergence, "entry_clip": share * noise}
    student, teacher = close_logits(noise)
    loss, grad = loss_and_grad(ROW_LOSS, student, teacher, divergence)
    exact_loss, exact_grad = divergence_rows(student, teacher, **divergence)
    assert relative_error(loss, exact_loss) < TOLERANCE[noise]
    assert relative_error(grad, exact_grad) < TOLERANCE[noise]


TRANSFORMS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.7},
    "bias": {},
    "scale": {"student_logit_scale": 0.3, "teacher_logit_scale": 0.3},
    "softcap": {"student_softcap": 30.0, "teacher_softcap": 30.0},
    "all": {
        "temperature": 0.7,
        "student_logit_scale": 0.3,
        "teacher_logit_scale": 0.3,
        "student_softcap": 30.0,
        "teacher_softcap": 30.0,
    },
}


@for_each_divergence
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_digits_survive_every_transform_of_the_logits(
    transform: str, noise: float, divergence: dict[str, Any]
) -> None:
    student, teacher = close_logits(noise)
    biases: list[Tensor | None] = [None, None]
    if transform in ("bias", "all"):
        generator = torch.Generator().manual_seed(1)
        bias, change = (torch.randn(student.shape[1], generator=generator) for _ in range(2))
        biases = [bias.to(student.device), (bias + noise * change).to(student.device)]
    grad = torch.empty_like(student)
    rows, config = student_rows(
        student.clone(), biases[0], divergence, return_stats=True, **TRANSFORMS[transform]
    )
    result = ROW_LOSS(
        rows, TeacherRows(teacher.clone(), biases[1]), config, grad=grad, group=ShardGroup(), block_rows=None
    )

    def exact_logits(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y = (x.double() if bias is None else x.double() + bias.double()) * config.student_logit_scale
        slope = torch.full_like(y, config.student_logit_scale)
        if config.student_softcap is not None:
            tanh = torch.tanh(y / config.student_softcap)
            y, slope = config.student_softcap * tanh, slope * (1 - tanh**2)
        return (y / config.temperature).cpu(), (slope / config.temperature).cpu()

    z_s, slope = exact_logits(student, biases[0])
    z_t, _ = exact_logits(teacher, biases[1])
    exact_loss, exact_grad = divergence_rows(z_s, z_t, **divergence)
    assert relative_error(result.loss, exact_loss) < TOLERANCE[noise]
    assert relative_error(grad, exact_grad * slope) < TOLERANCE[noise]
    assert result.stats is not None
    for statistic, kl_beta in ((result.stats.forward_kl, 0), (result.stats.reverse_kl, 1)):
        assert relative_error(statistic, divergence_rows(z_s, z_t, beta=kl_beta)[0]) < TOLERANCE[noise]


@for_each_divergence
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_an_offset_of_the_teachers_logits_costs_no_digits(noise: float, divergence: dict[str, Any]) -> None:
    student, teacher = close_logits(noise)
    teacher = teacher + 1e4
    loss, grad = loss_and_grad(ROW_LOSS, student, teacher, divergence)
    exact_loss, exact_grad = divergence_rows(student, teacher, **divergence)
    assert relative_error(loss, exact_loss) < TOLERANCE[noise]
    assert relative_error(grad, exact_grad) < TOLERANCE[noise]


@for_each_divergence
def test_gradient_of_a_nearly_one_hot_row_keeps_its_digits(divergence: dict[str, Any]) -> None:
    student, teacher = close_logits(1e-2)
    student, teacher = student.clone(), teacher.clone()
    top = student.double().logsumexp(-1).float() + 13.8  # 1 - p_top is about 1e-6
    student[:, 5], teacher[:, 5] = top, top + 0.01
    _, grad = loss_and_grad(ROW_LOSS, student, teacher, divergence)
    exact_grad = divergence_rows(student, teacher, **divergence)[1]
    for column in (5, slice(None)):
        assert relative_error(grad[:, column], exact_grad[:, column]) < 1e-4


@needs_no_kernel
@for_each_divergence
def test_pytorch_rows_keep_their_digits(divergence: dict[str, Any]) -> None:
    student, teacher = close_logits(1e-4)
    loss, grad = loss_and_grad(TorchJSD(), student, teacher, divergence)
    exact_loss, exact_grad = divergence_rows(student, teacher, **divergence)
    assert relative_error(loss, exact_loss) < TOLERANCE[1e-4]
    assert relative_error(grad, exact_grad) < TOLERANCE[1e-4]


@needs_no_kernel
@for_each_divergence
@pytest.mark.parametrize("noise", [3.0, 1e-2, 1e-5, 1e-7])
def test_long_double_oracle_equals_fifty_digits(noise: float, divergence: dict[str, Any]) -> None:
    mpmath = pytest.importorskip("mpmath")
    student, teacher = close_logits(noise, rows=1, vocab=12)
    (loss,), (grad,) = divergence_rows(student, teacher, **divergence)
    with mpmath.workdps(50):
        z_s, z_t = ([mpmath.mpf(z) for z in logits[0].tolist()] for logits in (student, teacher))
        step = mpmath.mpf(10) ** -15
        exact_loss = exact_divergence(mpmath, z_s, z_t, **divergence)
        exact_grad = []
        for column in range(len(z_s)):
            up, down = (
                [z + sign * step * (column == other) for other, z in enumerate(z_s)] for sign in (1, -1)
            )
            up, down = (exact_divergence(mpmath, z, z_t, **divergence) for z in (up, down))
            exact_grad.append(float((up - down) / (2 * step)))
    assert loss.item() == pytest.approx(float(exact_loss), rel=1e-4 if noise < 1e-6 else 1e-7)
    assert relative_error(grad, torch.tensor(exact_grad, dtype=torch.float64)) < 1e-7


def exact_divergence(
    mpmath: Any,
    z_s: list[Any],
    z_t: list[Any],
    divergence: str = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float = 0.5,
) -> Any:
    """Return the divergence of two rows of logits, by definition."""

    def softmax(logits: list[Any]) -> list[Any]:
        exponentials = [mpmath.exp(z) for z in logits]
        return [e / sum(exponentials) for e in exponentials]

    def kl(p: list[Any], q: list[Any]) -> Any:
        return sum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))

    def mixture(share: float, p: list[Any], q: list[Any]) -> list[Any]:
        return [mpmath.mpf(share) * a + (1 - mpmath.mpf(share)) * b for a, b in zip(p, q, strict=True)]

    p_s, p_t = softmax(z_s), softmax(z_t)
    if divergence == "skew_forward_kl":
        return kl(p_t, mixture(alpha, p_t, p_s))
    if divergence == "skew_reverse_kl":
        return kl(p_s, mixture(alpha, p_s, p_t))
    if divergence == "total_variation":
        return sum(abs(s - t) for s, t in zip(p_s, p_t, strict=True)) / 2
    if divergence == "mixed_kl" or beta in (0, 1):
        w = mpmath.mpf(reverse_weight if divergence == "mixed_kl" else beta)
        return (1 - w) * kl(p_t, p_s) + w * kl(p_s, p_t)
    m, b = mixture(beta, p_t, p_s), mpmath.mpf(beta)
    return b * kl(p_t, m) + (1 - b) * kl(p_s, m)


def bfloat16_case(spread: float, beta: float) -> Case:
    """Return linkedin/Liger-Kernel issue 1432 at a quarter of its sizes; its logits have spread 32."""
    generator = torch.Generator().manual_seed(0)
    hs, ht = (torch.randn(64, 1024, generator=generator).bfloat16() for _ in range(2))
    ws, wt = (torch.randn(8000, 1024, generator=generator).mul(spread / 32).bfloat16() for _ in range(2))
    return Case((hs, ws, ht, wt), {}, {"beta": beta})


def input_grads(loss: Any, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hs, ws, ht, wt = (t.detach().to(dtype) for t in case.tensors)
    value = loss(hs.requires_grad_(), ws.requires_grad_(), ht, wt, **case.options)
    return torch.autograd.grad(value, [hs, ws])


# Spread 32 is the issue's own. For 0 < beta < 1 such models are saturated: see the next test.
LIGER_1432 = [(32.0, 0.0), (16.0, 0.1), (16.0, 0.5), (16.0, 0.9), (32.0, 1.0)]


@needs_no_kernel
@pytest.mark.parametrize(("spread", "beta"), LIGER_1432)
def test_logits_of_bfloat16_inputs_are_not_rounded_to_bfloat16(spread: float, beta: float) -> None:
    case = bfloat16_case(spread, beta)
    exact = input_grads(reference.linear_jsd, case, torch.float64)
    for actual, expected in zip(input_grads(fused_linear_jsd, case, torch.bfloat16), exact, strict=True):
        assert relative_error(actual, expected) < 2**-8  # one rounding to bfloat16

    # The same arithmetic on the logits that a bfloat16 product gives is wrong by several percent.
    hs, ws, ht, wt = case.tensors
    _, grad = loss_and_grad(TorchJSD(), (hs @ ws.T).float(), (ht @ wt.T).float(), {"beta": beta})
    assert relative_error(grad.double() @ ws.double() / len(hs), exact[0]) > 0.02
    assert relative_error(grad.double().T @ hs.double() / len(hs), exact[1]) > 0.02


@needs_no_kernel
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_error_of_saturated_models_is_at_most_three_times_the_float32_references(beta: float) -> None:
    # Both models are nearly one-hot, on different tokens. The gradient, of norm 1e-7, is a difference of
    # terms of size 1 here as in the reference, so float32 keeps hardly a digit of it.
    case = bfloat16_case(32.0, beta)
    exact = input_grads(reference.linear_jsd, case, torch.float64)
    naive = input_grads(reference.linear_jsd, case, torch.float32)
    actual = input_grads(fused_linear_jsd, case, torch.bfloat16)
    for ours, plain, expected in zip(actual, naive, exact, strict=True):
        assert relative_error(ours, expected) < 3 * relative_error(plain, expected) + 2**-8
