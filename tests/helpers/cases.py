"""Random calls of the loss: what hypothesis draws, and how a backend and the float64 oracle answer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from fused_distill import DistillStats, fused_linear_jsd, fused_linear_topk_jsd, reference
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "torch"
HALF = (torch.bfloat16, torch.float16)


class Answer(NamedTuple):
    """Loss, statistics and gradients of student_hidden, student_weight, student_bias."""

    loss: Tensor
    stats: DistillStats
    grads: tuple[Tensor | None, ...]


# A public function and its reference.
FULL = (fused_linear_jsd, reference.linear_jsd)
TOPK = (fused_linear_topk_jsd, reference.linear_topk_jsd)


@dataclass(frozen=True)
class Case:
    """One call: the four main tensors, the keywords with tensors, the keywords without."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    per_token: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    losses: tuple[Callable[..., Any], Callable[..., Any]] = FULL

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another floating dtype."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        a, b, c, d = map(cast, self.tensors)
        return replace(self, tensors=(a, b, c, d), per_token={k: cast(t) for k, t in self.per_token.items()})

    def with_options(self, **options: Any) -> Case:
        """The same call with other keywords."""
        return replace(self, options={**self.options, **options})

    def answer(self, backend: str) -> Answer:
        """What a backend gives, "reference" included."""
        hs, ws, ht, wt = self.tensors
        leaves = {"hidden": hs.clone().requires_grad_(), "weight": ws.clone().requires_grad_()}
        per_token = dict(self.per_token)
        if "student_bias" in per_token:
            leaves["bias"] = per_token["student_bias"] = per_token["student_bias"].clone().requires_grad_()
        call = self.losses[backend == "reference"]
        result: Any = call(
            leaves["hidden"],
            leaves["weight"],
            ht,
            wt,
            **per_token,
            **{**self.options, "backend": backend, "return_stats": True},
        )
        loss, stats = result
        # Different factors per token, so that reduction="none" shows a mixed-up gradient.
        factors = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
        grads = torch.autograd.grad((loss * factors).sum(), list(leaves.values()))
        return Answer(loss.detach(), stats, grads)

    def oracle(self) -> Answer:
        """The reference in float64."""
        return self.to(torch.float64).answer("reference")

    def least_workspace(self) -> int:
        """The smallest workspace_bytes that the call accepts: one token at a time."""
        try:
            self.with_options(workspace_bytes=1, reduction="sum", normalizer=None).answer(BACKEND)
        except ValueError as error:
            found = re.search(r"at least (\d+)", str(error))
            if found:
                return int(found[1])
            raise
        raise AssertionError("workspace_bytes=1 was accepted")


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """Any call of the loss for a full-vocabulary teacher, logits of ordinary size."""
    randn, shape, vocab, spread = draw(_dimensions(dtypes))
    student_rows, teacher_rows = (vocab + draw(st.sampled_from([0, 1, 9])) for _ in range(2))
    ds, dt = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    tensors = (
        randn(*shape, ds),
        randn(student_rows, ds, scale=spread / ds**0.5),
        randn(*shape, dt),
        randn(teacher_rows, dt, scale=spread / dt**0.5),
    )
    options = {
        "teacher_logit_scale": draw(st.sampled_from([1.0, 1.5])),
        "teacher_softcap": draw(st.sampled_from([None, 30.0])),
        "vocab_size": draw(st.sampled_from([None, vocab, (vocab + 1) // 2])),
    }
    per_token = {"teacher_bias": randn(teacher_rows)} if draw(st.booleans()) else {}
    compared = options["vocab_size"] or min(student_rows, teacher_rows)
    return draw(_with_common_keywords(Case(tensors, per_token, options), randn, compared))


@st.composite
def topk_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """Any call of the loss for a top-k teacher: absent entries, repeated ids, K beyond the vocabulary."""
    randn, shape, vocab, spread = draw(_dimensions(dtypes))
    ds = draw(st.integers(1, 33))
    student_rows = vocab + draw(st.sampled_from([0, 1, 9]))
    logprobs = torch.log_softmax(randn(*shape, vocab, scale=spread).double(), -1)
    k = draw(st.one_of(st.integers(1, 8), st.sampled_from([vocab, vocab + 3])))
    order = randn(*shape, vocab) if draw(st.booleans()) else logprobs  # any tokens, or the likeliest
    ids = order.argsort(-1, descending=True)[..., torch.arange(k) % vocab]  # beyond the vocabulary: repeated
    logprobs = logprobs.gather(-1, ids).to(draw(st.sampled_from([torch.float32, *dtypes])))
    if draw(st.booleans()):
        absent = randn(*shape, k) > draw(st.sampled_from([-3.0, 0.0, 0.5]))
        logprobs[absent], ids[absent] = -torch.inf, draw(st.sampled_from([0, -1, 10**6]))
    tensors = (
        randn(*shape, ds),
        randn(student_rows, ds, scale=spread / ds**0.5),
        logprobs,
        ids.to(draw(st.sampled_from([torch.int32, torch.int64]))),
    )
    options = {
        "tail": draw(st.sampled_from(["bucket", "renormalize", "truncate"])),
        "vocab_size": draw(st.sampled_from([None, vocab])),
    }
    case = Case(tensors, {}, options, losses=TOPK)
    return draw(_with_common_keywords(case, randn, options["vocab_size"] or student_rows))


@st.composite
def _dimensions(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]
) -> tuple[Callable[..., Tensor], tuple[int, ...], int, float]:
    """Normal numbers of one dtype, the shape of the tokens, the vocabulary, the spread of the logits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    shapes = st.sampled_from([(1,), (2, 3)])
    if not INTERPRETED:
        shapes = st.one_of(st.tuples(st.integers(1, 70)), st.sampled_from([(2, 5), (3, 1, 4), (7, 10)]))
    # 2048 is a tile of the kernels: less than one, exactly one, one and a bit.
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 1000, 2047, 2048, 2049, 3000])))
    return randn, draw(shapes), vocab, draw(st.sampled_from([0.3, 1.0, 3.0]))


@st.composite
def _with_common_keywords(draw: st.DrawFn, case: Case, randn: Callable[..., Tensor], compared: int) -> Case:
    """The case with the keywords that all losses share; labels below `compared`."""
    shape, dtype = case.tensors[0].shape[:-1], case.tensors[0].dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    per_token = dict(case.per_token)
    options: dict[str, Any] = {
        **case.options,
        "beta": draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.5])),
        "student_logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "student_softcap": draw(st.sampled_from([None, 5.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = 17.0
    if draw(st.booleans()):
        per_token["mask"] = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    if draw(st.booleans()):
        per_token["student_bias"] = randn(len(case.tensors[1]))
    if draw(st.booleans()):
        per_token["token_weight"] = torch.rand(shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        labels = torch.randint(0, compared, shape, generator=generator)
        absent = torch.rand(shape, generator=generator) < 0.3
        per_token["labels"] = labels.masked_fill(absent, -100)
        options |= {"hard_weight": 0.6, "soft_weight": 0.4}
    case = replace(case, per_token=per_token, options=options)
    if draw(st.booleans()):
        # One token at a time, a few at a time, and blocks of rows inside a chunk.
        case = case.with_options(workspace_bytes=case.least_workspace() * draw(st.sampled_from([1, 2, 5])))
    return case
