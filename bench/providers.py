"""The losses under comparison, and the floor: the matrix products that all of them need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fused_distill.config import Backend, Tail

Product = Literal["torch.mm", "oneDNN"]  # what multiplies matrices


@dataclass(frozen=True)
class Case:
    """One shape and divergence. All providers get the same inputs."""

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int  # 0 for a top-k teacher
    beta: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    k: int = 0  # entries per token of a top-k teacher; 0: a full-vocabulary teacher
    workspace_bytes: int | None = None  # of fused-distill

    @property
    def label(self) -> str:
        """Name of the case, for messages and --only."""
        teacher = f"K{self.k}" if self.k else f"Dt{self.teacher_dim}"
        return f"N{self.tokens}-V{self.vocab}-Ds{self.student_dim}-{teacher}-beta{self.beta:g}"

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the inputs depend on."""
        return (self.tokens, self.vocab, self.student_dim, self.teacher_dim, self.k, self.dtype, self.device)


class Inputs(NamedTuple):
    """Arguments of a loss; the student's two require gradients."""

    student_hidden: Tensor  # (N, Ds)
    student_weight: Tensor  # (V, Ds)
    teacher_hidden: Tensor  # (N, Dt), or (N, K) log-probabilities of a top-k teacher
    teacher_weight: Tensor  # (V, Dt), or (N, K) ids of a top-k teacher


Loss = Callable[..., Tensor]  # four inputs -> mean loss in nats per token


def make_inputs(case: Case) -> Inputs:
    """Make random inputs whose logits have a standard deviation of 3, about that of a language model."""
    generator = torch.Generator(case.device).manual_seed(0)

    def randn(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=case.device)
        return values.mul_(scale).to(getattr(torch, case.dtype))

    ds, dt = case.student_dim, case.teacher_dim
    student = (
        randn(case.tokens, ds, 1.0).requires_grad_(),
        randn(case.vocab, ds, 3 / math.sqrt(ds)).requires_grad_(),
    )
    if not case.k:
        return Inputs(*student, randn(case.tokens, dt, 1.0), randn(case.vocab, dt, 3 / math.sqrt(dt)))
    # 95 % of the teacher's probability lies on K distinct tokens spread over the vocabulary.
    logprobs = torch.log_softmax(randn(case.tokens, case.k, 2.0).float(), -1) + math.log(0.95)
    stride = case.vocab // case.k
    ids = torch.randint(stride, (case.tokens, case.k), generator=generator, device=case.device)
    return Inputs(*student, logprobs, ids + stride * torch.arange(case.k, device=case.device))


def load_inputs(case: Case, path: Path) -> Inputs:
    """Map the inputs in a file, which the first process to come makes. All processes share its memory."""
    if not path.exists():
        made = make_inputs(case)
        torch.save([tensor.detach() for tensor in made], path)
        del made
    student_hidden, student_weight, *teacher = torch.load(path, mmap=True)
    return Inputs(student_hidden.requires_grad_(), student_weight.requires_grad_(), *teacher)


def ours(beta: float, backend: Backend) -> Loss:
    from fused_distill import fused_linear_jsd

    return lambda *inputs, **options: fused_linear_jsd(*inputs, beta=beta, backend=backend, **options)


def naive(beta: float) -> Loss:
    """Return the loss that trainers usually write: all logits, log_softmax and kl_div."""

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


def ours_topk(beta: float, tail: Tail) -> Loss:
    from fused_distill import fused_linear_topk_jsd

    return lambda *inputs, **options: fused_linear_topk_jsd(*inputs, beta=beta, tail=tail, **options)


def trl_topk(beta: float, with_tail: bool) -> Loss:
    """Return the loss of TRL's ServerDistillationTrainer: log_softmax of all logits, then a gather of K."""
    from trl.experimental.server_distillation import server_distillation_trainer as server

    def loss(hs: Tensor, ws: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
        log_s = F.log_softmax((hs @ ws.T).float(), -1).gather(-1, ids)
        present = torch.ones_like(ids, dtype=torch.bool)
        if with_tail:
            log_t = server._add_tail_bucket(logprobs, present)[0]
            log_s, present = server._add_tail_bucket(log_s, present)
        else:
            log_s, log_t = (log_p - log_p.logsumexp(-1, keepdim=True) for log_p in (log_s, logprobs))
        return server._jsd_divergence(log_s, log_t, beta, present).sum() / len(hs)

    return loss


def verl_topk(beta: float) -> Loss:
    """Return verl's FSDP loss, forward KL only: log_softmax of all logits, then K terms of the sum."""
    if beta != 0:
        raise ValueError("forward KL only")

    def loss(hs: Tensor, ws: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
        log_s = F.log_softmax((hs @ ws.T).float(), -1).gather(-1, ids)
        return (logprobs.exp() * (logprobs - log_s)).sum(-1).mean()

    return loss


LOSSES: dict[str, Callable[[float], Loss]] = {
    "fused-distill": lambda beta: ours(beta, "auto"),
    "fused-distill, torch": lambda beta: ours(beta, "torch"),
    "fused-distill, triton": lambda beta: ours(beta, "triton"),
    "Liger chunked": liger_chunked,
    "Liger Triton": liger_triton,
    "TRL": trl,
    "naive": naive,
    "fused-distill, bucket": lambda beta: ours_topk(beta, "bucket"),
    "fused-distill, truncate": lambda beta: ours_topk(beta, "truncate"),
    "fused-distill, renormalize": lambda beta: ours_topk(beta, "renormalize"),
    "TRL, bucket": lambda beta: trl_topk(beta, with_tail=True),
    "TRL, renormalize": lambda beta: trl_topk(beta, with_tail=False),
    "verl, truncate": verl_topk,
}
FLOOR = "floor"


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Multiply as fused-distill does: by oneDNN, which makes a new tensor, or by torch.mm into `out`."""
    from fused_distill.chunked.gemm import use_onednn

    if use_onednn(a.device, a.dtype):
        from fused_distill.chunked.cpu_product import onednn_mm

        onednn_mm(a, b)
    else:
        torch.mm(a, b, out=out, **({"out_dtype": out.dtype} if out.dtype != a.dtype else {}))


def floor_step(inputs: Inputs, topk: bool) -> Callable[[], None]:
    """Return a step of the unchunked matrix products alone: four, or three if topk."""
    hs, ws, ht, wt = (t.detach() for t in inputs)
    gradient = hs @ ws.T  # in place of the logit gradient: same shape and dtype
    dtype = torch.float32 if hs.is_cuda and hs.dtype != torch.float32 else hs.dtype
    logits = torch.empty(gradient.shape, dtype=dtype, device=hs.device)
    grad_hidden, grad_weight = torch.empty_like(hs), torch.empty_like(ws)

    def step() -> None:
        multiply(hs, ws.T, logits)
        if not topk:
            multiply(ht, wt.T, logits)
        multiply(gradient, ws, grad_hidden)
        multiply(gradient.T, hs, grad_weight)

    return step


def peak_step(case: Case, size: int) -> Callable[[], None]:
    """Return a step that multiplies two square matrices."""
    dtype = getattr(torch, case.dtype)
    a, b = (torch.randn(size, size, device=case.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: multiply(a, b, out)


def make_step(provider: str, case: Case, inputs: Inputs) -> Callable[[], Tensor | None]:
    """Return the function that is timed: it computes a loss and both gradients, and returns the loss."""
    if provider == FLOOR:
        return floor_step(inputs, topk=case.k > 0)
    loss = LOSSES[provider](case.beta)
    options = {} if case.workspace_bytes is None else {"workspace_bytes": case.workspace_bytes}

    def step() -> Tensor:
        inputs.student_hidden.grad = inputs.student_weight.grad = None
        result = loss(*inputs, **options)
        result.backward()
        return result.detach()

    return step
