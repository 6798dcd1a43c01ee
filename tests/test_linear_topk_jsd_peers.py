"""`fused_linear_topk_jsd` equals the losses of TRL's server trainer and verl."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_topk_jsd
from fused_distill.config import Tail
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend")

BATCH, TOKENS, VOCAB = 2, 5, 40


def trl_trainer(beta: float, add_tail: bool) -> Any:
    """Return as much of TRL's trainer as its losses use."""
    trl = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    trainer: Any = SimpleNamespace(beta=beta, loss_add_tail=add_tail)
    for name in ("_compute_sparse_top_1_divergence_loss", "_compute_server_forward_kl_loss"):
        setattr(trainer, name, getattr(trl.ServerDistillationTrainer, name).__get__(trainer))
    trainer._reduce_divergence_loss = trl.ServerDistillationTrainer._reduce_divergence_loss
    return trainer


class Numbers:
    """Student's logits, teacher's log-probabilities, the completion's tokens and labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (BATCH, TOKENS, VOCAB)
        self.student = (2 * torch.randn(size, generator=generator)).double().requires_grad_()
        self.teacher = torch.log_softmax(2 * torch.randn(size, generator=generator).double(), -1)
        self.tokens = torch.randint(VOCAB, (BATCH, TOKENS), generator=generator)
        # At every other position the completion's token is the teacher's most likely one.
        self.tokens[:, ::2] = self.teacher.argmax(-1)[:, ::2]
        self.labels = self.tokens.clone()
        self.labels[1, -2:] = -100
        self.mask = self.labels != -100

    def ours(self, ids: Tensor, beta: float, tail: Tail) -> Tensor:
        """Return our loss at these ids; the logits go through an identity head."""
        head = torch.eye(VOCAB, dtype=torch.float64)
        return fused_linear_topk_jsd(
            self.student, head, self.teacher.gather(-1, ids), ids, beta=beta, tail=tail, mask=self.mask
        )


def assert_same(ours: Tensor, peer: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(ours, peer, rtol=1e-6, atol=1e-9)
    our_grad, peer_grad = (torch.autograd.grad(loss, student)[0] for loss in (ours, peer))
    torch.testing.assert_close(our_grad, peer_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
def test_sampled_token_support_equals_trl(beta: float, add_tail: bool) -> None:
    # The support is the completion's token, and for beta < 1 the teacher's most likely token too.
    numbers = Numbers()
    top = numbers.teacher.argmax(-1, keepdim=True)
    actual = numbers.tokens.unsqueeze(-1)
    trl = trl_trainer(beta, add_tail)._compute_sparse_top_1_divergence_loss(
        student_log_probs=torch.log_softmax(numbers.student, -1),
        teacher_top1_token_ids=top.squeeze(-1),
        teacher_top1_logprobs=numbers.teacher.gather(-1, top).squeeze(-1),
        reverse_token_ids=numbers.tokens,
        reverse_teacher_logprobs=numbers.teacher.gather(-1, actual).squeeze(-1),
        labels=numbers.labels,
    )
    ids = actual if beta == 1 else torch.cat([top, actual], -1)
    ours = numbers.ours(ids, beta, "bucket" if add_tail else "renormalize")
    if beta == 1 and not add_tail:
        assert ours.item() == pytest.approx(trl.item(), abs=1e-12)  # one outcome in either model
    else:
        assert_same(ours, trl, numbers.student)


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("add_tail", [True, False])
def test_forward_top_k_equals_trl(k: int, add_tail: bool) -> None:
    numbers = Numbers()
    logprobs, ids = numbers.teacher.topk(k)
    trl = trl_trainer(0.0, add_tail)._compute_server_forward_kl_loss(
        {"topk_logprobs": logprobs, "topk_token_ids": ids},
        torch.log_softmax(numbers.student, -1),
        numbers.labels,
    )
    ours = numbers.ours(ids, 0.0, "bucket" if add_tail else "renormalize")
    if k == 1 and not add_tail:
        assert ours.item() == pytest.approx(trl.item(), abs=1e-12)
    else:
        assert_same(ours, trl, numbers.student)


def test_truncated_forward_kl_equals_verl() -> None:
    # verl: the K terms of forward KL against the full-vocabulary student.
    numbers = Numbers()
    logprobs, ids = numbers.teacher.topk(4)
    log_s = torch.log_softmax(numbers.student, -1).gather(-1, ids)
    verl = (logprobs.exp() * (logprobs - log_s)).sum(-1)[numbers.mask].mean()
    assert_same(numbers.ours(ids, 0.0, "truncate"), verl, numbers.student)
