"""Heads that are DTensors, as under FSDP2: every rank has its own tokens and a part of each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, reference, topk_logprobs
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about what happens before any kernel"),
    pytest.mark.xdist_group("forks"),
]


def sharded_head(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(rows + columns)
    head = nn.Linear(columns, rows)
    fully_shard(head)
    return head


def tokens_of_rank(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    hs, ht = torch.randn(7 + rank, 8, generator=generator), torch.randn(7 + rank, 6, generator=generator)
    return hs.requires_grad_(), ht


def full_gradients(head: nn.Linear) -> list[Tensor]:
    """Gather the gradients of a sharded head, having checked that they were in shards."""
    gradients = []
    for parameter in (head.weight, head.bias):
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.placements == (Shard(0),)
        gradients.append(parameter.grad.full_tensor())
    return gradients


def fsdp_step_of_rank(rank: int, ours: bool, reduction: str) -> tuple[Tensor, list[Tensor], int]:
    """Return loss, gradients and gathers of one step with our loss, or with the head's forward."""
    student, teacher = sharded_head(31, 8), sharded_head(31, 6)
    hs, ht = tokens_of_rank(rank)
    options: dict[str, Any] = {"beta": 0.3, "reduction": reduction}
    heads = [student.weight, student.bias, teacher.weight, teacher.bias]
    with CommDebugMode() as communication:
        if ours:
            ws, bs, wt, bt = heads
            loss = fused_linear_jsd(
                hs, ws, ht, wt, student_bias=bs, teacher_bias=bt, workspace_bytes=1 << 15, **options
            )
        else:
            one = torch.eye(31)
            loss = reference.linear_jsd(student(hs), one, teacher(ht), one, **options)
        gathers = sum(n for name, n in communication.get_comm_counts().items() if "gather" in str(name))
    assert isinstance(loss, Tensor)
    loss.sum().backward()
    assert hs.grad is not None
    return loss.detach(), [hs.grad, *full_gradients(student)], gathers


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_fsdp_heads_equal_those_of_the_heads_forward(two: Ranks, reduction: str) -> None:
    fused, plain = (two(fsdp_step_of_rank, ours, reduction) for ours in (True, False))
    for (loss, grads, gathers), (expected_loss, expected_grads, _) in zip(fused, plain, strict=True):
        torch.testing.assert_close((loss, grads), (expected_loss, expected_grads))
        assert gathers == 4  # two weights and two biases, however many chunks


def topk_fsdp_of_rank(rank: int) -> tuple[Any, ...]:
    student, teacher = sharded_head(31, 8), sharded_head(31, 6)
    hs, ht = tokens_of_rank(rank)
    with CommDebugMode() as communication:
        top = topk_logprobs(ht, teacher.weight, 5, bias=teacher.bias)
        loss = fused_linear_topk_jsd(hs, student.weight, *top[:2], student_bias=student.bias)
    loss.backward()
    gathered = [
        t.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        for t in (student.weight, student.bias, teacher.weight, teacher.bias)
    ]
    return loss.detach(), full_gradients(student), gathered, communication.get_total_counts()


def test_top_k_loss_and_log_probabilities_take_fsdp_heads(two: Ranks) -> None:
    results = two(topk_fsdp_of_rank)
    ws, bs, wt, bt = results[0][2]
    losses, leaves = [], (ws.requires_grad_(), bs.requires_grad_())
    for rank in range(2):
        hs, ht = tokens_of_rank(rank)
        top = topk_logprobs(ht, wt, 5, bias=bt)
        loss = reference.linear_topk_jsd(hs, ws, *top[:2], student_bias=bs)
        assert isinstance(loss, Tensor)
        losses.append(loss)
    expected = torch.autograd.grad((losses[0] + losses[1]) / 2, leaves)
    for (loss, grads, _, n_collectives), expected_loss in zip(results, losses, strict=True):
        torch.testing.assert_close((loss, tuple(grads)), (expected_loss.detach(), expected))
        assert n_collectives == 4
