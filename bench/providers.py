"""The losses that are compared, and the floor: the four matrix products that none of them can do without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """One shape and divergence. Every provider gets the same numbers."""

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int
    beta: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def label(self) -> str:
        """The case in a test's name."""
        return f"N{self.tokens}-V{self.vocab}-Ds{self.student_dim}-Dt{self.teacher_dim}-beta{self.beta:g}"


class Inputs(NamedTuple):
    """Hidden states and heads; the student's two require gradients."""

    student_hidden: Tensor  # (N, Ds)
    student_weight: Tensor  # (V, Ds)
    teacher_hidden: Tensor  # (N, Dt)
    teacher_weight: Tensor  # (V, Dt)


Loss = Callable[..., Tensor]  # the four inputs -> mean loss, nats per token


def make_inputs(case: Case) -> Inputs:
    """Random inputs whose logits have a standard deviation of 3, about that of a language model."""
    generator = torch.Generator(case.device).manual_seed(0)

    def randn(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=case.device)
        return values.mul_(scale).to(getattr(torch, case.dtype))

    ds, dt = case.student_dim, case.teacher_dim
    return Inputs(
        randn(case.tokens, ds, 1.0).requires_grad_(),
        randn(case.vocab, ds, 3 / math.sqrt(ds)).requires_grad_(),
        randn(case.tokens, dt, 1.0),
        randn(case.vocab, dt, 3 / math.sqrt(dt)),
    )


def ours(beta: float, backend: str) -> Loss:
    from fused_distill import fused_linear_jsd

    return lambda *inputs: fused_linear_jsd(*inputs, beta=beta, backend=backend)


def naive(beta: float) -> Loss:
    """All logits, log_softmax and kl_div, as trainers write it."""

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        log_s = F.log_softmax((hs @ ws.T).float(), -1)
        log_t = F.log_softmax((ht @ wt.T).float(), -1)

        def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

        if beta == 0:
            return kl(log_t, log_s)
        if beta == 1:
            return kl(log_s, log_t)
        log_m = torch.logsumexp(torch.stack([log_t + math.log(beta), log_s + math.log1p(-beta)]), 0)
        return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)

    return loss


def liger_chunked(beta: float, compiled: bool = True) -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=1024
    )

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        labels = torch.zeros(len(hs), dtype=torch.long, device=hs.device)
        result: Any = module(hs, ws, ht, wt, labels)
        return result

    return loss


def liger_triton(beta: float) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda hs, ws, ht, wt: module(hs, ws, ht, wt, None)


def trl(beta: float) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        result: Any = ChunkedDivergenceFunction.apply(hs, ws, None, ht, wt, None, beta)
        return result[0].mean()

    return loss


LOSSES: dict[str, Callable[[float], Loss]] = {
    "fused-distill": lambda beta: ours(beta, "auto"),
    "fused-distill, torch": lambda beta: ours(beta, "torch"),
    "fused-distill, triton": lambda beta: ours(beta, "triton"),
    "Liger chunked": liger_chunked,
    "Liger Triton": liger_triton,
    "TRL": trl,
    "naive": naive,
}
FLOOR = "floor"


def floor_step(inputs: Inputs) -> Callable[[], None]:
    """The four products alone, on whole matrices, into memory that is there already."""
    hs, ws, ht, wt = (t.detach() for t in inputs)
    gradient = hs @ ws.T  # stands for the gradient of the logits: same shape, dtype and kind of numbers
    logits = torch.empty(gradient.shape, dtype=torch.float32, device=hs.device)
    grad_hidden, grad_weight = torch.empty_like(hs), torch.empty_like(ws)
    to_float32 = {"out_dtype": torch.float32} if hs.is_cuda and hs.dtype != torch.float32 else {}
    if not to_float32:
        logits = logits.to(hs.dtype)

    def step() -> None:
        torch.mm(hs, ws.T, out=logits, **to_float32)
        torch.mm(ht, wt.T, out=logits, **to_float32)
        torch.mm(gradient, ws, out=grad_hidden)
        torch.mm(gradient.T, hs, out=grad_weight)

    return step


def make_step(provider: str, case: Case, inputs: Inputs) -> Callable[[], Tensor | None]:
    """What is timed: a loss and both of its gradients, from nothing. Gives the loss."""
    if provider == FLOOR:
        return floor_step(inputs)
    loss = LOSSES[provider](case.beta)

    def step() -> Tensor:
        inputs.student_hidden.grad = inputs.student_weight.grad = None
        result = loss(*inputs)
        result.backward()
        return result.detach()

    return step
