"""Tensors that are changed in place between forward and backward, where backward reads them again or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKEND, FULL, TOPK
from fused_distill.config import Reduction
from torch import Tensor

STUDENT = ["student_hidden", "student_weight", "student_bias"]
TEACHERS = {
    FULL: ["teacher_hidden", "teacher_weight", "teacher_bias"],
    TOPK: ["teacher_logprobs", "teacher_ids"],
}
READ_AGAIN = [
    (functions, name)
    for functions, teacher in TEACHERS.items()
    for name in [*STUDENT, *teacher, "token_weight", "labels"]
]
TWO_PASSES: list[Reduction] = ["mean", "sum"]  # whose second backward pass computes the gradients again


def arguments(functions: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    student = {"student_hidden": randn(6, 8), "student_weight": randn(40, 8), "student_bias": randn(40)}
    teacher = {"teacher_hidden": randn(6, 5), "teacher_weight": randn(40, 5), "teacher_bias": randn(40)}
    if functions == TOPK:
        logprobs, ids = torch.log_softmax(randn(6, 40), -1).topk(4)
        teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids}
    tokens = {
        "token_weight": randn(6).abs(),
        "labels": torch.tensor([3, 39, -100, 0, 7, 7]),
        "mask": torch.tensor([True, True, False, True, True, True]),
    }
    return {name: tensor.requires_grad_() for name, tensor in student.items()} | teacher | tokens


def change(tensor: Tensor) -> None:
    """Change a tensor in place, e.g. as an optimizer or the next batch would."""
    with torch.no_grad():
        tensor.copy_(tensor.flip(0))


def summed_loss(functions: Any, tensors: dict[str, Tensor], reduction: Reduction, **options: Any) -> Tensor:
    options = {"hard_weight": 0.5, "backend": BACKEND, **options}
    return functions[0](**tensors, reduction=reduction, **options).sum()


def gradients(loss: Tensor, tensors: dict[str, Tensor], *, retain_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [tensors[name] for name in STUDENT], retain_graph=retain_graph)


@pytest.mark.parametrize("reduction", ["none", *TWO_PASSES])
@pytest.mark.parametrize(("functions", "name"), READ_AGAIN)
def test_backward_refuses_a_changed_tensor_that_it_reads_again(
    functions: Any, name: str, reduction: Reduction
) -> None:
    tensors = arguments(functions)
    loss = summed_loss(functions, tensors, reduction)
    if reduction in TWO_PASSES:
        gradients(loss, tensors, retain_graph=True)
    change(tensors[name])
    message = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message if name in STUDENT else f"^{name}, which .* {message}"):
        gradients(loss, tensors)


@pytest.mark.parametrize("tail", ["truncate", "renormalize"])
@pytest.mark.parametrize("name", ["teacher_logprobs", "teacher_ids", "token_weight"])
def test_backward_refuses_changes_for_every_tail(tail: str, name: str) -> None:
    tensors = {k: t for k, t in arguments(TOPK).items() if k != "labels"}
    loss = summed_loss(TOPK, tensors, "none", tail=tail, hard_weight=0.0)
    change(tensors[name])
    with pytest.raises(RuntimeError, match=f"^{name}, which "):
        gradients(loss, tensors)


@pytest.mark.parametrize(("functions", "name"), [*READ_AGAIN, (FULL, "mask"), (TOPK, "mask")])
def test_one_backward_pass_of_a_summed_loss_reads_no_tensor_again(functions: Any, name: str) -> None:
    tensors = arguments(functions)
    expected = gradients(summed_loss(functions, tensors, "sum"), tensors)
    loss = summed_loss(functions, tensors, "sum")
    change(tensors[name])
    assert all(map(torch.equal, gradients(loss, tensors), expected))


@pytest.mark.parametrize("functions", TEACHERS)
@pytest.mark.parametrize("name", ["mask", "labels"])
def test_changes_of_tensors_that_forward_has_copied_do_not_matter(functions: Any, name: str) -> None:
    tensors = arguments(functions) | {"labels": torch.tensor([3, 39, -100, 0, 7, 7], dtype=torch.int32)}
    expected = gradients(summed_loss(functions, tensors, "none"), tensors)
    loss = summed_loss(functions, tensors, "none")
    change(tensors[name])
    assert all(map(torch.equal, gradients(loss, tensors), expected))


@pytest.mark.parametrize("functions", TEACHERS)
def test_teachers_made_in_inference_mode_are_accepted(functions: Any) -> None:
    tensors = arguments(functions)
    expected = gradients(summed_loss(functions, tensors, "none"), tensors)
    with torch.inference_mode():
        teacher = {name: tensors[name].clone() for name in TEACHERS[functions]}
    loss = summed_loss(functions, {**tensors, **teacher}, "none")
    assert all(map(torch.equal, gradients(loss, tensors), expected))
