"""Predict what a call of `fused_linear_jsd` would allocate, multiply and launch, without making it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chunked.loop import ChunkLoop, prepare
from .chunked.memory import memory_of
from .chunked.teacher import FullTeacher
from .chunked.tensors import LossTensors
from .chunked.workspace import ChunkPlan
from .config import DivergenceForm, LossConfig
from .stats import WeightFunction
from .validation import DEFAULT_REVERSE_WEIGHT


@dataclass(frozen=True)
class Product:
    """Matrix products (m, k) @ (k, n) of one kind. On a CPU some run on slices of the vocabulary."""

    name: str
    count: int
    m: int
    k: int
    n: int
    dtype: torch.dtype  # of the factors; the result has the dtype of the logits

    @property
    def operations(self) -> int:
        """Return the multiplications and additions of all of them."""
        return 2 * self.count * self.m * self.k * self.n


@dataclass(frozen=True)
class LossPlan:
    """Sizes of a call of `fused_linear_jsd`; print it for a table."""

    device: torch.device
    backend: str  # "triton", "cpp" or "torch"
    n_tokens: int  # valid tokens
    rows: int  # tokens whose logits exist at once
    gradient_rows: int  # tokens whose logit gradient exists at once; equal to rows where it overwrites logits
    n_chunks: int  # of rows tokens
    n_gradient_chunks: int  # of gradient_rows tokens; 0 without gradients
    workspace_bytes: int  # bound on buffer_bytes
    buffers: dict[str, int]  # bytes by name
    products: tuple[Product, ...]
    kernel_launches_per_chunk: int | None  # of Triton's row kernels; None for other backends

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(self.buffers.values())

    def __str__(self) -> str:
        launches = self.kernel_launches_per_chunk
        rows = [
            ("device, backend", f"{self.device}, {self.backend}"),
            ("valid tokens", f"{self.n_tokens:,}"),
            ("rows of logits", f"{self.rows:,} in {_count(self.n_chunks, 'chunk')}"),
            ("rows of the gradient", f"{self.gradient_rows:,} in {_count(self.n_gradient_chunks, 'chunk')}"),
            ("row kernels per chunk", "no Triton kernels" if launches is None else str(launches)),
            *((name, _mib(size)) for name, size in self.buffers.items()),
            ("all buffers", f"{_mib(self.buffer_bytes)} of {_mib(self.workspace_bytes)}"),
            *(
                (p.name, f"{p.count:,} x ({p.m:,}, {p.k:,}) @ ({p.k:,}, {p.n:,}) {_dtype(p.dtype)}")
                for p in self.products
            ),
            ("operations", f"{sum(p.operations for p in self.products) / 1e12:,.2f}e12"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan(
    student_hidden: Tensor,  # (..., Ds)
    student_weight: Tensor,  # (Vs, Ds)
    teacher_hidden: Tensor,  # (..., Dt)
    teacher_weight: Tensor,  # (Vt, Dt)
    *,
    device: torch.device | str | None = None,
    device_memory: int | None = None,
    mask: Tensor | None = None,  # (...) bool
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    token_weight: Tensor | WeightFunction | None = None,  # (...)
    token_data: Mapping[str, Tensor] | None = None,  # (...) each
    labels: Tensor | None = None,  # (...)
    reverse_weight: float | Tensor = DEFAULT_REVERSE_WEIGHT,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> LossPlan:
    """Return what `fused_linear_jsd` would allocate, multiply and launch for the same arguments.

    Nothing of the call's size is computed or allocated, and only the tensors' shapes, dtypes and
    requires_grad count, besides the number of valid tokens in mask. The tensors may be on the device "meta",
    where they need no memory: `torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta")`. Every token is
    then taken as valid. With reduction="none" the plan is that of the backward pass.

    Args:
        student_hidden: (..., Ds) as in `fused_linear_jsd`, like the other tensors.
        student_weight: (Vs, Ds).
        teacher_hidden: (..., Dt).
        teacher_weight: (Vt, Dt).
        device: plan for this device, which need not be present. A device that is not present is taken to
            multiply half-precision matrices into float32. None: the device of student_hidden.
        device_memory: bytes of the device's memory, on which the default workspace_bytes depends. None: that
            of the device, or no limit if it is not present.
        mask: (...) bool, True for valid tokens.
        student_bias: (Vs,).
        teacher_bias: (Vt,).
        token_weight: (...) or a function; it changes no size.
        token_data: (...) each; they change no size.
        labels: (...); they change no size.
        reverse_weight: it changes no size.
        normalizer: it changes no size.
        **options: the other options of `fused_linear_jsd`.

    Returns:
        `LossPlan`.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it), meta tensors without device, or
            backend="reference", which works without chunks.
        ImportError: backend="triton" without Triton.
    """
    config = LossConfig(**options)
    if config.backend == "reference":
        raise ValueError('backend must be "auto", "triton", "cpp" or "torch" for a plan, got "reference"')
    target = student_hidden.device if device is None else torch.device(device)
    if target.type == "meta":
        raise ValueError("device must name the device to plan for, as student_hidden is on the device meta")
    del labels, normalizer
    tensors = LossTensors(
        student_hidden,
        student_weight,
        student_bias,
        FullTeacher(teacher_hidden, teacher_weight, teacher_bias),
        mask,
        token_weight,
        token_data=token_data,
        labels=None,
        reverse_weight=reverse_weight,
        normalizer=None,
    )
    shard = tensors.check(replace(config, hard_weight=0.0))
    n_valid = None if mask is None or mask.is_meta else int(mask.sum())
    valid = None if n_valid is None else torch.empty(n_valid, dtype=torch.int64, device="meta")
    loop = prepare(_on_meta(tensors), config, shard, target, valid)
    memory, chunks = loop.plan(memory_of(target) if device_memory is None else device_memory)
    assert memory.teacher_head is not None
    with_grad = any(loop.needs_grad)
    return LossPlan(
        target,
        loop.config.backend,
        chunks.n_tokens,
        chunks.rows,
        chunks.grad_rows if with_grad else 0,
        len(list(chunks.chunks())),
        len(list(chunks.grad_chunks())) if with_grad else 0,
        memory.bound,
        {name: need.bytes_for(chunks) for name, need in memory.needs.items()},
        tuple(_products(loop, chunks, memory.head.dtype, memory.teacher_head.dtype)),
        triton_launches(config, with_grad=with_grad) if loop.config.backend == "triton" else None,
    )


def triton_launches(config: LossConfig, *, with_grad: bool) -> int:
    """Return how many Triton kernels run per chunk, besides small PyTorch operations on its rows' sums.

    Two compute the row statistics, which give the plain KL divergences. Every other divergence, one with
    entry_clip, and the gradient take one more each.
    """
    plain = (DivergenceForm.FORWARD_KL, DivergenceForm.REVERSE_KL, DivergenceForm.MIXED_KL)
    return 2 + (config.form not in plain or config.entry_clip is not None) + with_grad


def _on_meta(tensors: LossTensors) -> LossTensors:
    """Return tensors without memory for the student and teacher, and no others."""

    def stand_in(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return empty.requires_grad_(tensor.requires_grad)

    def stand_in_or_none(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else stand_in(tensor)

    teacher = tensors.teacher
    assert isinstance(teacher, FullTeacher)
    return LossTensors(
        stand_in(tensors.student_hidden),
        stand_in(tensors.student_weight),
        stand_in_or_none(tensors.student_bias),
        FullTeacher(
            stand_in(teacher.hidden).reshape(-1, teacher.hidden.shape[-1]),
            stand_in(teacher.weight),
            stand_in_or_none(teacher.bias),
        ),
        None,
        None,
        None,
        None,
        tensors.reverse_weight if isinstance(tensors.reverse_weight, float) else DEFAULT_REVERSE_WEIGHT,
        None,
    )


def _products(
    loop: ChunkLoop, chunks: ChunkPlan, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> Iterator[Product]:
    """Yield the products of the student's and the teacher's heads, those of a smaller last chunk apart."""
    inputs, student = loop.inputs, loop.student
    columns, width = inputs.shard.student_size, student.hidden.shape[-1]
    teacher = inputs.teacher
    assert isinstance(teacher, FullTeacher)
    for count, n in _sizes(chunks.chunks()):
        yield Product("student logits", count, n, width, columns, dtype)
        yield Product("teacher logits", count, n, teacher.hidden.shape[-1], inputs.shard.size, teacher_dtype)
    hidden, weight, _ = loop.needs_grad
    for count, n in _sizes(chunks.grad_chunks()):
        if hidden:
            yield Product("hidden gradient", count, n, columns, width, dtype)
        if weight:
            yield Product("weight gradient", count, columns, n, width, dtype)


def _sizes(chunks: Iterable[slice]) -> list[tuple[int, int]]:
    """Return (count, tokens) of each size of chunk, in order; none without tokens."""
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    return [(sizes.count(n), n) for n in dict.fromkeys(sizes) if n]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.1f} MiB"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
