"""Temporary memory stays within workspace_bytes, in the chunk plan and when measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from emulated_gpu import gpu_rules
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from fused_distill.chunked.workspace import Workspace, plan_chunks
from fused_distill.config import Tail
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import PeakMemory

SIZES = st.integers(0, 10**6)
NEEDS = st.builds(
    Workspace,
    fixed=SIZES,
    per_row=st.integers(1, 10**6),
    per_grad_row=st.sampled_from([0, 1, 10**3, 10**6]),
    per_block_row=SIZES,
    block_rows=st.integers(0, 300),
)


@given(st.integers(0, 5000), st.integers(1, 10**9), NEEDS, st.booleans())
def test_chunks_cover_the_tokens_once_within_the_bound(
    n_tokens: int, bound: int, need: Workspace, constant_sizes: bool
) -> None:
    minimum = need.fixed + need.per_row + need.per_grad_row + need.per_block_row
    if bound < minimum:
        with pytest.raises(ValueError, match=f"workspace_bytes must be at least {minimum} "):
            plan_chunks(n_tokens, bound, need, constant_sizes=constant_sizes)
        bound = minimum
    plan = plan_chunks(n_tokens, bound, need, constant_sizes=constant_sizes)
    gradients = [list(plan.chunks(part)) for part in plan.grad_chunks()]
    chunks = [chunk for part in gradients for chunk in part]
    assert chunks == list(plan.chunks())
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(n_tokens))
    assert all(part[-1].stop - part[0].start <= plan.grad_buffer_rows for part in gradients)
    used = need.fixed + plan.rows * need.per_row + plan.block_rows * need.per_block_row
    assert used + plan.grad_buffer_rows * need.per_grad_row <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 4 << 20, 16 << 20])
def test_memory_of_a_call_stays_within_its_workspace(
    workspace_bytes: int, masked: bool, dtype: torch.dtype
) -> None:
    n, vocab, ds, dt = 300, 3000, 16, 24
    tensors = [torch.randn(size).to(dtype) for size in ((n, ds), (vocab, ds), (n, dt), (vocab, dt))]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    mask = torch.rand(n) < 0.7 if masked else None
    gc.collect()
    with PeakMemory(tensors) as memory:
        loss = fused_linear_jsd(
            *tensors, mask=mask, workspace_bytes=workspace_bytes, return_stats=True, backend="torch"
        )[0]
    gradient_bytes = 4 * (tensors[0].numel() + tensors[1].numel())
    assert loss > 0
    assert memory.peak > gradient_bytes + workspace_bytes // 8  # the measurement sees the logits
    assert memory.peak <= gradient_bytes + workspace_bytes


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [6 << 20, 24 << 20])
def test_memory_stays_within_the_workspace_by_the_rules_of_a_gpu(
    workspace_bytes: int, dtype: torch.dtype, masked: bool, autocast: bool
) -> None:
    n, vocab, ds, dt = 900, 3000, 16, 24
    tensors = [torch.randn(size).to(dtype) for size in ((n, ds), (vocab, ds), (n, dt), (vocab, dt))]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    mask = torch.rand(n) < 0.7 if masked else None
    gc.collect()
    with (
        gpu_rules(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        PeakMemory([*tensors, *([] if mask is None else [mask])]) as memory,
    ):
        fused_linear_jsd(*tensors, mask=mask, workspace_bytes=workspace_bytes, backend="torch")
    gradient_bytes = 4 * (tensors[0].numel() + tensors[1].numel())
    assert memory.peak > gradient_bytes + workspace_bytes // 8
    assert memory.peak <= gradient_bytes + workspace_bytes


VARIANTS: dict[str, dict[str, Any]] = {
    "labels": {"labels": torch.arange(300), "hard_weight": 0.5},
    "softcaps and biases": {
        "student_softcap": 5.0,
        "teacher_softcap": 30.0,
        "student_bias": torch.zeros(3000, requires_grad=True),
        "teacher_bias": torch.zeros(3000),
    },
    "no statistics": {"return_stats": False},
    "forward KL": {"beta": 0.0},
    "reverse KL": {"beta": 1.0},
    "skewed KL with clipped terms": {"divergence": "skew_reverse_kl", "entry_clip": 0.01},
    "mixed KL": {"divergence": "mixed_kl", "reverse_weight": torch.rand(300)},
    "each token's loss": {"reduction": "none"},
    "fewer columns": {"vocab_size": 1700},
    "token weights": {"token_weight": torch.rand(300)},
}
VARIANTS["everything"] = {
    k: v for name in ("labels", "softcaps and biases", "token weights") for k, v in VARIANTS[name].items()
}
VARIANTS["everything in bfloat16"] = {**VARIANTS["everything"], "dtype": torch.bfloat16}
VARIANTS["everything in float64"] = {**VARIANTS["everything"], "dtype": torch.float64}


@pytest.mark.parametrize("workspace_bytes", [4 << 20, 16 << 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_stays_within_the_workspace_for_every_option(variant: str, workspace_bytes: int) -> None:
    options: dict[str, Any] = {"return_stats": True, "workspace_bytes": workspace_bytes, **VARIANTS[variant]}
    dtype = options.pop("dtype", torch.float32)
    n, vocab, ds, dt = 300, 3000, 16, 24
    hs, ws, ht, wt = (torch.randn(size).to(dtype) for size in ((n, ds), (vocab, ds), (n, dt), (vocab, dt)))
    leaves = [hs.requires_grad_(), ws.requires_grad_()]
    if "student_bias" in options:
        leaves.append(options["student_bias"])
    gc.collect()
    with PeakMemory(
        [hs, ws, ht, wt, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    ) as memory:
        result = fused_linear_jsd(hs, ws, ht, wt, backend="torch", **options)
        loss = (result[0] if options["return_stats"] else result).sum()
        torch.autograd.grad(loss, leaves)
    accumulated = 8 if dtype == torch.float64 else 4
    returned = 0 if accumulated == dtype.itemsize else dtype.itemsize  # the gradients as the caller gets them
    # Loss and statistics of all tokens once more: what `return_stats` and "none" hand out.
    per_token = 8 * 8 * n
    gradient_bytes = (accumulated + returned) * sum(leaf.numel() for leaf in leaves)
    allowed = gradient_bytes + per_token + workspace_bytes
    assert memory.peak <= allowed, (
        f"{(memory.peak - allowed) / workspace_bytes:.1%} of the workspace too much"
    )


@pytest.mark.parametrize("workspace_bytes", [4 << 20, 16 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_memory_of_a_top_k_call_stays_within_its_workspace(
    tail: Tail, k: int, dtype: torch.dtype, workspace_bytes: int
) -> None:
    n, vocab, ds = 300, 3000, 16
    hs, ws = (torch.randn(size).to(dtype).requires_grad_() for size in ((n, ds), (vocab, ds)))
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(n)])
    logprobs = torch.log_softmax(torch.randn(n, k + 1), -1)[:, :k]
    mask = torch.rand(n) < 0.7
    gc.collect()
    with PeakMemory([hs, ws, ids, logprobs, mask]) as memory:
        loss, _ = fused_linear_topk_jsd(
            hs,
            ws,
            logprobs,
            ids,
            tail=tail,
            mask=mask,
            student_softcap=5.0,
            workspace_bytes=workspace_bytes,
            return_stats=True,
            backend="torch",
        )
    assert loss.isfinite()
    gradient_bytes = 4 * (hs.numel() + ws.numel())
    checked_ids = 8 * ids.numel()  # bools of the ids' size, and the tokens' statistics
    allowed = gradient_bytes + checked_ids + 64 * n + workspace_bytes
    assert memory.peak <= allowed, (
        f"{(memory.peak - allowed) / workspace_bytes:.1%} of the workspace too much"
    )


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 4 << 20])
def test_memory_of_topk_logprobs_stays_within_its_workspace(workspace_bytes: int) -> None:
    n, vocab, dim, k = 300, 3000, 16, 20
    hidden, weight = torch.randn(n, dim), torch.randn(vocab, dim)
    with PeakMemory([hidden, weight]) as memory:
        topk_logprobs(hidden, weight, k, softcap=5.0, temperature=0.7, workspace_bytes=workspace_bytes)
    results = 12 * n * k
    assert memory.peak <= results + workspace_bytes


def named_minimum(error: pytest.ExceptionInfo[ValueError]) -> int:
    return int(str(error.value).split("at least ")[1].split()[0])


def test_smallest_workspace_is_the_one_that_the_error_names() -> None:
    tensors = [torch.randn(size) for size in ((9, 4), (50, 4), (9, 5), (50, 5))]
    with pytest.raises(ValueError, match=r"workspace_bytes must be at least \d+ ") as error:
        fused_linear_jsd(*tensors, workspace_bytes=1, backend="torch")
    minimum = named_minimum(error)
    expected = fused_linear_jsd(*tensors, backend="torch")
    torch.testing.assert_close(fused_linear_jsd(*tensors, workspace_bytes=minimum, backend="torch"), expected)
    with pytest.raises(ValueError, match=f"at least {minimum} "):
        fused_linear_jsd(*tensors, workspace_bytes=minimum - 1, backend="torch")


@pytest.mark.parametrize("rules", [nullcontext, gpu_rules], ids=["cpu", "gpu"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [fused_linear_jsd, fused_linear_topk_jsd])
def test_smallest_workspace_suffices_for_the_backward_pass(
    function: Any, dtype: torch.dtype, autocast: bool, rules: Callable[[], AbstractContextManager[None]]
) -> None:
    # reduction="none" plans twice, and only the second plan has gradients.
    hs, ws, ht, wt = (torch.randn(size).to(dtype) for size in ((9, 4), (50, 4), (9, 5), (50, 5)))
    if function is fused_linear_topk_jsd:
        ht, wt = torch.log_softmax((ht @ wt.T).float(), -1).topk(3)
    hs.requires_grad_()
    options = {"reduction": "none", "backend": "torch"}
    with rules():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with pytest.raises(ValueError, match="at least") as error:
                function(hs, ws, ht, wt, workspace_bytes=1, **options)
            minimum = named_minimum(error)
            losses = [function(hs, ws, ht, wt, workspace_bytes=m, **options) for m in (minimum, None)]
        gradients = [torch.autograd.grad(loss.sum(), hs)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_peak_memory_sees_temporaries_and_their_end() -> None:
    with PeakMemory([]) as memory:
        a = torch.ones(1000)
        b = (a + 1) * 2  # three live for a moment
        del a
        b[10:].add_(1)  # a view and an update in place cost nothing
        c = b + 1
    assert c.shape == b.shape
    assert memory.peak == 12000
    assert memory.live == 8000
