"""Replacements of Liger's losses give liger-kernel's results, and refuse what they cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import INTERPRETED
from fused_distill.compat.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from long_double import divergence_rows
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend")

TOKENS, VOCAB, STUDENT_DIM, TEACHER_DIM = 11, 70, 8, 12
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
SOFT_ONLY: dict[str, Any] = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}


class Numbers(NamedTuple):
    """The tensors of one call; the student's require gradients."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor
    teacher_bias: Tensor

    @classmethod
    def random(cls, ignore_index: int = -100, teacher_rows: int = VOCAB) -> Numbers:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
        labels[::3] = ignore_index
        return cls(
            randn(TOKENS, STUDENT_DIM).requires_grad_(),
            randn(VOCAB, STUDENT_DIM).requires_grad_(),
            randn(TOKENS, TEACHER_DIM),
            randn(teacher_rows, TEACHER_DIM),
            labels,
            randn(VOCAB).requires_grad_(),
            randn(teacher_rows),
        )

    def run(self, loss_fn: Any, bias: bool = True) -> list[Tensor]:
        """Return the losses, then the gradients of 3 * loss, so that the incoming gradient is not 1."""
        result = loss_fn(*(self if bias else self[:5]))
        losses = result if isinstance(result, tuple) else (result,)
        students = [self.student_input, self.student_weight, *([self.student_bias] if bias else [])]
        return [*(loss.detach() for loss in losses), *torch.autograd.grad(3 * losses[0], students)]


def chunked(**options: Any) -> Any:
    """Return Liger's chunked loss, uncompiled, with several chunks."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    return liger.LigerFusedLinearJSDLoss(compiled=False, chunk_size=4, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("hard", "soft"), [(0.5, 0.5), (0.0, 1.0), (0.7, 0.0)])
def test_chunked_loss_and_gradients_equal_ligers(beta: float, bias: bool, hard: float, soft: float) -> None:
    options: dict[str, Any] = {
        "beta": beta,
        "weight_hard_loss": hard,
        "weight_soft_loss": soft,
        "temperature": 1.7,
    }
    numbers = Numbers.random()
    ours = numbers.run(LigerFusedLinearJSDLoss(**options), bias)
    torch.testing.assert_close(ours, numbers.run(chunked(**options), bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_soft_and_hard_losses_equal_ligers(weights: tuple[float, float]) -> None:
    options: dict[str, Any] = {
        "weight_hard_loss": weights[0],
        "weight_soft_loss": weights[1],
        "return_soft_hard_loss": True,
    }
    numbers = Numbers.random()
    ours = numbers.run(LigerFusedLinearJSDLoss(temperature=0.6, **options))
    torch.testing.assert_close(ours, numbers.run(chunked(temperature=0.6, **options)), rtol=1e-5, atol=1e-6)


def test_ignore_index_may_be_any_token() -> None:
    numbers = Numbers.random(ignore_index=7)
    ours = numbers.run(LigerFusedLinearJSDLoss(ignore_index=7))
    torch.testing.assert_close(ours, numbers.run(chunked(ignore_index=7)), rtol=1e-5, atol=1e-6)


def test_no_valid_token_gives_zero_losses_and_gradients() -> None:
    numbers = Numbers.random()
    numbers.labels.fill_(-100)
    for value in numbers.run(LigerFusedLinearJSDLoss(return_soft_hard_loss=True)):
        assert value.count_nonzero() == 0


def test_options_may_change_between_calls() -> None:
    # Liger reads its attributes at each call; trainers anneal beta that way.
    numbers = Numbers.random()
    changed = LigerFusedLinearJSDLoss(beta=0.1)
    changed.beta = 0.8
    torch.testing.assert_close(numbers.run(changed), numbers.run(LigerFusedLinearJSDLoss(beta=0.8)))


def test_padded_teacher_head_equals_ligers_where_padding_has_no_probability() -> None:
    # Liger's student has a logit of 0 at the padding: far below the others after a constant of 40.
    numbers = Numbers.random(teacher_rows=VOCAB + 6)
    numbers.teacher_bias[VOCAB:] = -60
    numbers.student_bias.data += 40
    ours = numbers.run(LigerFusedLinearJSDLoss())
    torch.testing.assert_close(ours, numbers.run(chunked()), rtol=1e-5, atol=2e-6)


def test_padded_teacher_head_leaves_equal_models_without_loss() -> None:
    # Unlike Liger's.
    numbers = Numbers.random()
    padded = torch.cat(
        [
            numbers.student_weight.detach(),
            torch.randn(6, STUDENT_DIM, generator=torch.Generator().manual_seed(0)),
        ]
    )
    hidden = numbers.student_input.detach()
    arguments = (numbers.student_input, numbers.student_weight, hidden, padded, numbers.labels)
    assert LigerFusedLinearJSDLoss(**SOFT_ONLY)(*arguments).item() == 0
    assert chunked(**SOFT_ONLY)(*arguments).item() > 1e-2


def test_nearly_equal_models_keep_their_digits() -> None:
    # Unlike Liger's.
    numbers = Numbers.random()
    close = numbers.student_weight.detach() * (1 + 1e-5)
    tensors = (numbers.student_input, numbers.student_weight, numbers.student_input.detach(), close)
    hs, ws, ht, wt = (t.detach().double() for t in tensors)
    exact = divergence_rows(hs @ ws.T, ht @ wt.T, beta=0.5)[0][numbers.labels != -100].mean().item()
    ours = LigerFusedLinearJSDLoss(**SOFT_ONLY)(*tensors, numbers.labels).item()
    assert ours == pytest.approx(exact, rel=0.01)
    assert chunked(**SOFT_ONLY)(*tensors, numbers.labels).item() != pytest.approx(exact, rel=1)


# Liger's Triton loss needs a GPU or the interpreter, which must be set before Triton is imported: hence a
# process of its own.
LIGER_TRITON = """
import sys
import torch
from liger_kernel.transformers import LigerFusedLinearJSD

path = sys.argv[1]
results = []
for tensors, options, labels in torch.load(path):
    loss = LigerFusedLinearJSD(**options)(*tensors, labels)
    results.append([loss.detach(), *torch.autograd.grad(loss, tensors[:2])])
torch.save(results, path)
"""


@pytest.fixture(scope="module")
def triton_calls() -> list[tuple[dict[str, Any], Tensor | None]]:
    numbers = Numbers.random()
    return [
        ({"jsd_beta": beta, "temperature": temperature, "accum_dtype": accum_dtype}, labels)
        for beta in BETAS
        for temperature, labels, accum_dtype in [
            (1.0, None, None),
            (1.7, numbers.labels, torch.float32),
            (1.0, torch.full_like(numbers.labels, -100), None),
        ]
    ]


@pytest.fixture(scope="module")
def triton_results(
    triton_calls: list[tuple[dict[str, Any], Tensor | None]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Tensor]]:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    path: Path = tmp_path_factory.mktemp("liger") / "calls.pt"
    tensors = Numbers.random()[:4]
    torch.save([(tensors, options, labels) for options, labels in triton_calls], path)
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", LIGER_TRITON, str(path)], env=environment, check=True)
    return torch.load(path)


def test_triton_loss_and_gradients_equal_ligers(
    triton_calls: list[tuple[dict[str, Any], Tensor | None]], triton_results: list[list[Tensor]]
) -> None:
    for (options, labels), peer in zip(triton_calls, triton_results, strict=True):
        tensors = Numbers.random()[:4]
        loss = LigerFusedLinearJSD(**options)(*tensors, labels)
        ours = [loss.detach(), *torch.autograd.grad(loss, tensors[:2])]
        torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LigerFusedLinearJSDLoss(weight_hard_loss=-1), "weight_hard_loss must not be negative"),
        (lambda: LigerFusedLinearJSDLoss(weight_soft_loss=-1), "weight_soft_loss must not be negative"),
        (lambda: LigerFusedLinearJSDLoss(beta=2), "beta must be between"),
        (lambda: LigerFusedLinearJSDLoss(temperature=0), "temperature must be positive"),
        (lambda: LigerFusedLinearJSDLoss(chunk_size=0), "chunk_size must be at least 1"),
        (lambda: LigerFusedLinearJSD(jsd_beta=-1), "^jsd_beta must be between"),
        (lambda: LigerFusedLinearJSD(accum_dtype=torch.float64), "accum_dtype must be None or torch.float32"),
    ],
)
def test_option_without_an_equivalent_is_named(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("loss", "name"), [(LigerFusedLinearJSDLoss(), "true_labels"), (LigerFusedLinearJSD(), "shift_labels")]
)
def test_labels_that_do_not_fit_are_named_as_liger_names_them(loss: Any, name: str) -> None:
    tensors, labels = Numbers.random()[:4], Numbers.random()[4]
    with pytest.raises(ValueError, match=f"^{name} must have the shape of the tokens"):
        loss(*tensors, labels[1:])
    with pytest.raises(TypeError, match=f"^{name} must be int64 or int32"):
        loss(*tensors, labels.double())


@pytest.mark.parametrize("loss", [LigerFusedLinearJSDLoss(), LigerFusedLinearJSD()])
def test_smaller_teacher_vocabulary_is_refused(loss: Any) -> None:
    numbers = Numbers.random(teacher_rows=VOCAB - 1)
    with pytest.raises(ValueError, match="teacher_weight must have at least the rows of student_weight"):
        loss(*numbers[:5])


def test_liger_kernel_is_not_imported() -> None:
    code = "import sys, fused_distill.compat.liger; sys.exit('liger_kernel' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
