"""Compiled row arithmetic in calls of several chunks.

For arguments that overlap, torch.compile has given wrong numbers here, and only from the second call on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BACKEND, TOPK, Case, LossResult
from checks import assert_stats_close
from fused_distill.rows import backend as rows_backend
from fused_distill.rows import compiled as rows_compiled
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(BACKEND == "triton", reason="about torch.compile")


@pytest.fixture(autouse=True)
def small_problems_are_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.compiler.reset()
    monkeypatch.setattr(rows_backend, "_COMPILE_MIN_LOGITS", 1)
    yield
    assert rows_compiled.Compiler.works


def several_chunks(
    dtype: torch.dtype, keyword_tensors: dict[str, Tensor] | None = None, **options: Any
) -> Case:
    """Return a call with 70 tokens in chunks of about 30."""
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=generator)).to(dtype)

    tensors = (randn(70, 16), randn(1000, 16, 0.7), randn(70, 24), randn(1000, 24, 0.6))
    case = Case(tensors, keyword_tensors or {}, options)
    return case.with_options(workspace_bytes=30 * case.min_workspace())


def assert_as_exact(result: LossResult, oracle: LossResult, dtype: torch.dtype, rtol: float = 1e-5) -> None:
    """Compare the loss, and gradients of bfloat16 inputs up to their one rounding."""
    assert_close(result.loss.double(), oracle.loss, rtol=rtol, atol=1e-7)
    for grad, exact in zip(result.grads, oracle.grads, strict=True):
        assert grad is not None
        assert exact is not None
        error = (grad.double() - exact).norm() / exact.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2**-8)


# A CPU computes products of bfloat16 heads in float32, so the logit gradient is written over the student's
# logits for either dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_compiled_calls_equal_the_oracle(beta: float, dtype: torch.dtype) -> None:
    case = several_chunks(dtype, beta=beta)
    result, oracle = case.run("torch"), case.oracle()
    assert_as_exact(result, oracle, dtype)
    assert_stats_close(result, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", ["bucket", "truncate"])
@pytest.mark.parametrize("hard", [False, True])
def test_compiled_top_k_calls_equal_the_oracle(tail: str, dtype: torch.dtype, hard: bool) -> None:
    case = several_chunks(dtype)
    hs, ws, ht, wt = case.tensors
    top = torch.log_softmax(ht.float() @ wt.float().T, -1).topk(9)
    options: dict[str, Any] = {"tail": tail, "beta": 0.3}
    keyword_tensors: dict[str, Tensor] = {}
    if hard:
        options |= {"hard_weight": 0.5, "temperature": 1.4, "student_softcap": 6.0}
        keyword_tensors["labels"] = torch.arange(70) * 3
    case = Case((hs, ws, top.values, top.indices), keyword_tensors, options, TOPK)
    case = case.with_options(workspace_bytes=30 * case.min_workspace())
    assert_as_exact(case.run("torch"), case.oracle(), dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_calls_with_mask_weights_and_labels_equal_the_oracle(reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    keyword_tensors = {
        "mask": torch.rand(70, generator=generator) < 0.7,
        "token_weight": torch.rand(70, generator=generator),
        "labels": torch.randint(0, 1000, (70,), generator=generator),
        "student_bias": torch.randn(1000, generator=generator),
    }
    options = {"beta": 0.3, "reduction": reduction, "hard_weight": 0.5, "student_softcap": 6.0}
    case = several_chunks(torch.float32, keyword_tensors, **options)
    assert_as_exact(case.run("torch"), case.oracle(), torch.float32, rtol=1e-4)
