"""Masked tokens cost nothing."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
@pytest.mark.parametrize("shape", [(100,), (4, 25)])
def test_the_fused_path_computes_on_valid_tokens_only(shape: tuple[int, ...]) -> None:
    vocab, student_size, teacher_size = 50, 8, 6
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    mask = torch.rand(shape, generator=generator) < 0.3
    masked = (~mask).unsqueeze(-1)
    student = randn(*shape, student_size).masked_fill(masked, torch.nan).requires_grad_()
    teacher = randn(*shape, teacher_size).masked_fill(masked, torch.nan)
    heads = randn(vocab, student_size).requires_grad_(), randn(vocab, teacher_size)
    with FlopCounterMode(display=False) as counter:
        loss = fused_linear_jsd(student, heads[0], teacher, heads[1], mask=mask, backend="torch")
        loss.backward()
    # Both models' logits and the gradients of student hidden states and weight, of valid tokens only.
    assert counter.get_total_flops() == int(mask.sum()) * vocab * (6 * student_size + 2 * teacher_size)
    assert loss.isfinite()
    assert student.grad is not None
    assert (student.grad[~mask] == 0).all()
