"""The compiled row arithmetic in whole calls of several chunks.

torch.compile has given wrong numbers here for arguments that overlap, and only from the second call on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import INTERPRETED, TOPK, Case
from fused_distill.rows import backend as _backends
from fused_distill.rows import compiled as _stages
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about torch.compile")


@pytest.fixture(autouse=True)
def small_problems_are_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.compiler.reset()
    monkeypatch.setattr(_backends, "_COMPILE_MIN_LOGITS", 1)
    yield
    assert _stages.Compiler.works


def several_chunks(dtype: torch.dtype, per_token: dict[str, Tensor] | None = None, **options: Any) -> Case:
    """70 tokens in chunks of about 30."""
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=generator)).to(dtype)

    tensors = (randn(70, 16), randn(1000, 16, 0.7), randn(70, 24), randn(1000, 24, 0.6))
    case = Case(tensors, per_token or {}, options)
    return case.with_options(workspace_bytes=30 * case.least_workspace())


# float32 heads have their gradient written over the logits, bfloat16 ones in a buffer of its own.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_compiled_calls_equal_the_oracle(beta: float, dtype: torch.dtype) -> None:
    case = several_chunks(dtype, beta=beta)
    got, want = case.answer("torch"), case.oracle()
    assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    for column, true in zip(got.stats[:5], want.stats[:5], strict=True):
        assert_close(column.to(true.dtype), true, rtol=1e-4, atol=1e-5)
    for grad, true in zip(got.grads, want.grads, strict=True):
        assert grad is not None
        assert true is not None
        error = (grad.double() - true).norm() / true.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", ["bucket", "truncate"])
@pytest.mark.parametrize("hard", [False, True])
def test_compiled_top_k_calls_equal_the_oracle(tail: str, dtype: torch.dtype, hard: bool) -> None:
    case = several_chunks(dtype)
    hs, ws, ht, wt = case.tensors
    top = torch.log_softmax(ht.float() @ wt.float().T, -1).topk(9)
    options: dict[str, Any] = {"tail": tail, "beta": 0.3}
    per_token: dict[str, Tensor] = {}
    if hard:
        options |= {"hard_weight": 0.5, "temperature": 1.4, "student_softcap": 6.0}
        per_token["labels"] = torch.arange(70) * 3
    case = Case((hs, ws, top.values, top.indices), per_token, options, TOPK)
    case = case.with_options(workspace_bytes=30 * case.least_workspace())
    got, want = case.answer("torch"), case.oracle()
    assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    for grad, true in zip(got.grads, want.grads, strict=True):
        assert grad is not None
        assert true is not None
        error = (grad.double() - true).norm() / true.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_calls_with_mask_weights_and_labels_equal_the_oracle(reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    per_token = {
        "mask": torch.rand(70, generator=generator) < 0.7,
        "token_weight": torch.rand(70, generator=generator),
        "labels": torch.randint(0, 1000, (70,), generator=generator),
        "student_bias": torch.randn(1000, generator=generator),
    }
    options = {"beta": 0.3, "reduction": reduction, "hard_weight": 0.5, "student_softcap": 6.0}
    case = several_chunks(torch.float32, per_token, **options)
    got, want = case.answer("torch"), case.oracle()
    assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)
    for grad, true in zip(got.grads, want.grads, strict=True):
        assert grad is not None
        assert true is not None
        assert (grad.double() - true).norm() < 1e-5 * true.norm()
