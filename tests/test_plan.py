"""The workspace bound is kept, in the plan and in fact."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from fused_distill import fused_linear_jsd
from fused_distill._plan import plan_chunks
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = st.integers(0, 10**6)
REQUESTS = {
    "fixed_bytes": st.integers(0, 10**6),
    "row_bytes": st.integers(1, 10**6),
    "block_row_bytes": SIZES,
    "block_rows": st.integers(0, 300),
}


@given(st.integers(0, 5000), st.integers(1, 10**9), st.fixed_dictionaries(REQUESTS))
def test_chunks_cover_the_tokens_once_within_the_bound(
    n_tokens: int, bound: int, request: dict[str, int]
) -> None:
    least = request["fixed_bytes"] + request["row_bytes"] + request["block_row_bytes"]
    if bound < least:
        with pytest.raises(ValueError, match=f"workspace_bytes must be at least {least} "):
            plan_chunks(n_tokens, bound, **request)
        bound = least
    plan = plan_chunks(n_tokens, bound, **request)
    covered = [i for chunk in plan.chunks() for i in range(chunk.start, chunk.stop)]
    assert covered == list(range(n_tokens))
    used = (
        request["fixed_bytes"]
        + plan.rows * request["row_bytes"]
        + plan.block_rows * request["block_row_bytes"]
    )
    assert used <= bound


class PeakMemory(TorchDispatchMode):
    """Bytes of live tensors made under this mode, and their peak."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {t.untyped_storage().data_ptr() for t in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key = storage.data_ptr()
        if key == 0 or key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 4 << 20, 16 << 20])
def test_a_call_stays_within_its_workspace(workspace_bytes: int, masked: bool, dtype: torch.dtype) -> None:
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
    assert loss.isfinite()
    assert memory.peak > gradient_bytes + workspace_bytes // 8  # the measurement sees the logits
    assert memory.peak <= gradient_bytes + workspace_bytes
