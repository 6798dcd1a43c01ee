"""Kernels that the losses launch per chunk on a GPU, counted in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from cases import INTERPRETED
from checks import TAILS
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd
from fused_distill.chunked.workspace import ChunkPlan
from fused_distill.config import Tail
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts launches of Triton's interpreter")

TOKENS, VOCAB, WIDTH, K = 12, 100, 8, 4
VIEWS = {"alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t"}
VIEWS |= {"transpose", "unbind", "unsqueeze", "view"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"}
PRODUCTS = {"addmm", "baddbmm", "bmm", "mm", "_linear_pointwise"}


class Launches(TorchDispatchMode):
    """Count PyTorch's operations, but for matrix products, and launches of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS | ALLOCATIONS | PRODUCTS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Launches:
        from triton.runtime.interpreter import GridExecutor

        run, names = GridExecutor.__call__, self.names

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(executor.fn.__name__)
            before = len(names)
            result = run(executor, *args, **kwargs)
            del names[before:]  # the interpreter's own copies
            return result

        self._patch = mock.patch.object(GridExecutor, "__call__", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()


def launches(tail: Tail | None, chunks: int, **options: Any) -> list[str]:
    """Return what a call of the top-k loss launches, or of the full loss if tail is None."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    support = torch.log_softmax(torch.randn(TOKENS, VOCAB, generator=generator), -1).topk(K)
    rows = math.ceil(TOKENS / chunks)
    plan = ChunkPlan(TOKENS, rows, rows, rows, 1)
    with mock.patch("fused_distill.chunked.memory.plan_chunks", return_value=plan), Launches() as counted:
        if tail is None:
            fused_linear_jsd(hidden, weight, hidden.detach(), weight.detach(), backend="triton", **options)
        else:
            fused_linear_topk_jsd(
                hidden, weight, support.values, support.indices, tail=tail, backend="triton", **options
            )
    return counted.names


EVERY_OPTION: dict[str, Any] = {
    "return_stats": True,
    "temperature": 2.0,
    "student_softcap": 5.0,
    "hard_weight": 0.5,
    "labels": torch.arange(TOKENS),
    "mask": torch.ones(TOKENS, dtype=torch.bool),
    "student_bias": torch.zeros(VOCAB),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("every_option", [False, True])
def test_a_chunk_launches_at_most_twelve_kernels_besides_the_products(
    tail: Tail, beta: float, every_option: bool
) -> None:
    options = {"beta": beta} | (EVERY_OPTION if every_option else {})
    few, many = (launches(tail, chunks, **options) for chunks in (2, 6))
    assert (len(many) - len(few)) / 4 <= 12, sorted(many)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("every_option", [False, True])
def test_a_chunk_of_the_full_loss_launches_at_most_sixteen_kernels_besides_the_products(
    beta: float, every_option: bool
) -> None:
    options = {"beta": beta} | (EVERY_OPTION if every_option else {})
    few, many = (launches(None, chunks, **options) for chunks in (2, 6))
    assert (len(many) - len(few)) / 4 <= 16, sorted(many)
