"""A top-k teacher scored at the student's top k tokens, which suits reverse KL better than its own top k.

Reverse KL weighs tokens by the student's probability. If the student is confident of a token outside the
teacher's top k, that token is hidden in the tail. At the student's top k, or at the union of both top k, the
same number of log-probabilities captures most of the divergence.

    python examples/students_support.py
"""

from __future__ import annotations

import torch
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs

TOKENS, VOCAB, STUDENT_DIM, TEACHER_DIM, K = 512, 32000, 256, 512, 16


def main() -> None:
    torch.manual_seed(0)
    student_hidden = torch.randn(TOKENS, STUDENT_DIM, requires_grad=True)
    student_head = (4 * torch.randn(VOCAB, STUDENT_DIM) / STUDENT_DIM**0.5).requires_grad_()
    teacher_hidden = torch.cat([student_hidden.detach(), torch.randn(TOKENS, TEACHER_DIM - STUDENT_DIM)], -1)
    teacher_head = torch.cat(
        [0.8 * student_head.detach(), torch.randn(VOCAB, TEACHER_DIM - STUDENT_DIM) / 16], -1
    )

    # The choice of tokens is not differentiated.
    student_ids = topk_logprobs(student_hidden, student_head, K).ids
    teacher_ids = topk_logprobs(teacher_hidden, teacher_head, K).ids
    supports = {
        "teacher's top k": teacher_ids,
        "student's top k": student_ids,
        "union of both": torch.cat([student_ids, teacher_ids], -1),  # an id in both is counted once
    }
    exact = fused_linear_jsd(student_hidden, student_head, teacher_hidden, teacher_head, beta=1.0)
    (gradient,) = torch.autograd.grad(exact, student_hidden)
    print(f"{'support':18} {'reverse KL':>11} {'gradient error':>15}")
    for name, ids in supports.items():
        logprobs = topk_logprobs(teacher_hidden, teacher_head, 0, ids).actual_logprobs
        assert logprobs is not None
        loss = fused_linear_topk_jsd(student_hidden, student_head, logprobs, ids, beta=1.0)
        (gradient_at_ids,) = torch.autograd.grad(loss, student_hidden)
        error = ((gradient_at_ids - gradient).norm() / gradient.norm()).item()
        print(f"{name:18} {loss.item():11.4f} {error:15.2f}")
    print(f"{'full vocabulary':18} {exact.item():11.4f}")


if __name__ == "__main__":
    main()
