"""Calls of the losses for tests: hypothesis draws them, a backend or the float64 reference runs them.

FUSED_DISTILL_TEST_DEVICE=cuda puts their tensors on a GPU, where the Triton kernels are tested (`make
test-gpu`). By default they are on the CPU, where the kernels run under TRITON_INTERPRET=1 only. With
emulated-cuda they are on the CPU too, drawn in bfloat16 and float16, and go the way of a GPU: its chunks, its
half-precision products and logit gradients (`emulated_gpu`).
"""

from __future__ import annotations

import operator
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
HALF = (torch.bfloat16, torch.float16)
DEVICE_NAMES = {None: "cpu", "cpu": "cpu", "cuda": "cuda", "emulated-cuda": "cpu"}


def device_named(name: str | None) -> torch.device:
    """Return the device that a value of FUSED_DISTILL_TEST_DEVICE names, the CPU for None."""
    if name not in DEVICE_NAMES:
        raise ValueError(f"FUSED_DISTILL_TEST_DEVICE must be cpu, cuda or emulated-cuda, got {name!r}")
    return torch.device(DEVICE_NAMES[name])


DEVICE = device_named(os.environ.get("FUSED_DISTILL_TEST_DEVICE"))
EMULATED_GPU = os.environ.get("FUSED_DISTILL_TEST_DEVICE") == "emulated-cuda"
DTYPES = HALF if EMULATED_GPU else (torch.float32,)
# What a GPU would do without Triton is emulated in PyTorch.
_ON_CPU = "torch" if EMULATED_GPU else "cpp"
BACKEND = "triton" if INTERPRETED or DEVICE.type == "cuda" else _ON_CPU


class LossResult(NamedTuple):
    """Loss, statistics and gradients of student_hidden, student_weight, student_bias."""

    loss: Tensor
    stats: DistillStats
    grads: tuple[Tensor | None, ...]


FULL = (fused_linear_jsd, reference.linear_jsd)  # a public function and its reference
TOPK = (fused_linear_topk_jsd, reference.linear_topk_jsd)


@dataclass(frozen=True)
class Case:
    """One call of a loss: its positional tensors, the keywords that are tensors, and the others.

    The tensors are moved to the device under test.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    keyword_tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    functions: tuple[Callable[..., Any], Callable[..., Any]] = FULL

    def __post_init__(self) -> None:
        a, b, c, d = self.tensors
        object.__setattr__(self, "tensors", (a.to(DEVICE), b.to(DEVICE), c.to(DEVICE), d.to(DEVICE)))
        moved = {name: tensor.to(DEVICE) for name, tensor in self.keyword_tensors.items()}
        object.__setattr__(self, "keyword_tensors", moved)

    def to(self, dtype: torch.dtype) -> Case:
        """Return the same numbers in another floating dtype."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        a, b, c, d = map(cast, self.tensors)
        keyword_tensors = {name: cast(tensor) for name, tensor in self.keyword_tensors.items()}
        return replace(self, tensors=(a, b, c, d), keyword_tensors=keyword_tensors)

    def with_options(self, **options: Any) -> Case:
        """Return the same call with other keywords."""
        return replace(self, options={**self.options, **options})

    @property
    def divergence(self) -> dict[str, Any]:
        """The options of the divergence, without a weight of each token."""
        names = ("divergence", "beta", "alpha", "reverse_weight", "entry_clip")
        return {name: self.options[name] for name in names if name in self.options}

    def loss(self, **options: Any) -> Tensor:
        """Return the loss on the backend under test, without statistics and gradients."""
        options = {**self.options, "backend": BACKEND, **options}
        return self.functions[0](*self.tensors, **self.keyword_tensors, **options)

    def run(self, backend: str = BACKEND) -> LossResult:
        """Return the loss, statistics and gradients that a backend gives, "reference" included."""
        hs, ws, *teacher = self.tensors
        keyword_tensors = dict(self.keyword_tensors)
        leaves = [hs.clone().requires_grad_(), ws.clone().requires_grad_()]
        if "student_bias" in keyword_tensors:
            keyword_tensors["student_bias"] = keyword_tensors["student_bias"].clone().requires_grad_()
            leaves.append(keyword_tensors["student_bias"])
        options = {**self.options, "backend": backend, "return_stats": True}
        function = self.functions[backend == "reference"]
        loss, stats = function(leaves[0], leaves[1], *teacher, **keyword_tensors, **options)
        # Another factor for each token, so that a mixed-up gradient shows under reduction="none".
        factors = torch.arange(1, loss.numel() + 1, dtype=loss.dtype, device=DEVICE).reshape(loss.shape)
        grads = torch.autograd.grad((loss * factors).sum(), leaves)
        return LossResult(loss.detach(), stats, grads)

    def oracle(self) -> LossResult:
        """Return what the reference gives in float64."""
        return self.to(torch.float64).run("reference")

    def min_workspace(self, backend: str = BACKEND) -> int:
        """Return the smallest workspace_bytes that the call accepts, which holds one token at a time."""
        try:
            self.with_options(workspace_bytes=1, reduction="sum", normalizer=None).run(backend)
        except ValueError as error:
            minimum = re.search(r"at least (\d+)", str(error))
            if minimum:
                return int(minimum[1])
            raise
        raise AssertionError("workspace_bytes=1 was accepted")


def close_logits(
    noise: float, rows: int = 2, vocab: int = 8000 if INTERPRETED else 32000
) -> tuple[Tensor, Tensor]:
    """Return a student's and a teacher's float32 logits of size about 10, whose difference is `noise`.

    They are several tiles of the kernels. The interpreter takes a second for sixteen tiles.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    student = teacher + noise * torch.randn(rows, vocab, generator=generator)
    return student.to(DEVICE), teacher.to(DEVICE)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Draw a call of the loss for a full-vocabulary teacher, with logits of ordinary size."""
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
    keyword_tensors = {"teacher_bias": randn(teacher_rows)} if draw(st.booleans()) else {}
    n_columns = options["vocab_size"] or min(student_rows, teacher_rows)
    return draw(_with_common_keywords(Case(tensors, keyword_tensors, options), randn, n_columns))


@st.composite
def topk_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Draw a call of the loss for a top-k teacher: absent entries, repeated ids, K beyond the vocabulary."""
    randn, shape, vocab, spread = draw(_dimensions(dtypes))
    ds = draw(st.integers(1, 33))
    student_rows = vocab + draw(st.sampled_from([0, 1, 9]))
    logprobs = torch.log_softmax(randn(*shape, vocab, scale=spread).double(), -1)
    largest = min(vocab, 130) if INTERPRETED else vocab  # the interpreter takes seconds for more
    k = draw(st.one_of(st.integers(1, 8), st.sampled_from([largest, largest + 3])))
    order = randn(*shape, vocab) if draw(st.booleans()) else logprobs  # any tokens, or the most likely ones
    ids = order.argsort(-1, descending=True)[..., torch.arange(k) % vocab]  # repeated if k > vocab
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
    case = Case(tensors, {}, options, functions=TOPK)
    return draw(_with_common_keywords(case, randn, options["vocab_size"] or student_rows))


@st.composite
def _dimensions(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]
) -> tuple[Callable[..., Tensor], tuple[int, ...], int, float]:
    """Draw a source of normal numbers, the shape of the tokens, the vocabulary, the spread of the logits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    shapes = st.sampled_from([(1,), (2, 3)])
    if not INTERPRETED:
        shapes = st.one_of(st.tuples(st.integers(1, 70)), st.sampled_from([(2, 5), (3, 1, 4), (7, 10)]))
    # A tile of the kernels has 2048 columns: less than one tile, exactly one, and more than one.
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 1000, 2047, 2048, 2049, 3000])))
    return randn, draw(shapes), vocab, draw(st.sampled_from([0.3, 1.0, 3.0]))


def _divergences(tail: str | None) -> st.SearchStrategy[dict[str, Any]]:
    """Return the options of any divergence that goes with a top-k teacher's tail; None: another teacher.

    Of three "mixed_kl", "per token" stands for a weight of each token.
    """
    jsd = st.sampled_from([{"beta": beta} for beta in (0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0)])
    if tail == "truncate":
        return jsd
    skewed = st.builds(
        lambda name, alpha: {"divergence": name, "alpha": alpha},
        st.sampled_from(["skew_forward_kl", "skew_reverse_kl"]),
        st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    )
    mixed = st.sampled_from(
        [{"divergence": "mixed_kl", "reverse_weight": weight} for weight in (0.0, 0.3, 1.0, "per token")]
    )
    variation = st.just({"divergence": "total_variation"})
    clips = st.sampled_from([{}, {}, {"entry_clip": 0.3}, {"entry_clip": 0.02}])
    return st.builds(operator.or_, st.one_of(jsd, skewed, mixed, variation), clips)


@st.composite
def _with_common_keywords(draw: st.DrawFn, case: Case, randn: Callable[..., Tensor], n_columns: int) -> Case:
    """Draw the keywords that all losses share, labels below `n_columns`, and add them to the case."""
    shape, dtype = case.tensors[0].shape[:-1], case.tensors[0].dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keyword_tensors = dict(case.keyword_tensors)
    options: dict[str, Any] = {
        **case.options,
        **draw(_divergences(case.options.get("tail"))),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.5])),
        "student_logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "student_softcap": draw(st.sampled_from([None, 5.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if options.get("reverse_weight") == "per token":
        del options["reverse_weight"]
        keyword_tensors["reverse_weight"] = torch.rand(shape, generator=generator).to(dtype)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = 17.0
    if draw(st.booleans()):
        keyword_tensors["mask"] = torch.rand(shape, generator=generator) < draw(
            st.sampled_from([0.0, 0.5, 1.0])
        )
    if draw(st.booleans()):
        keyword_tensors["student_bias"] = randn(len(case.tensors[1]))
    if draw(st.booleans()):
        keyword_tensors["token_weight"] = torch.rand(shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        labels = torch.randint(0, n_columns, shape, generator=generator)
        absent = torch.rand(shape, generator=generator) < 0.3
        keyword_tensors["labels"] = labels.masked_fill(absent, -100)
        options |= {"hard_weight": 0.6, "soft_weight": 0.4}
    case = replace(case, keyword_tensors=keyword_tensors, options=options)
    if draw(st.booleans()):
        # One token per chunk, a few, and several blocks of rows per chunk.
        case = case.with_options(workspace_bytes=case.min_workspace() * draw(st.sampled_from([1, 2, 5])))
    return case


def strided(tensor: Tensor) -> Tensor:
    """Return the same numbers with other numbers between them in memory."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
