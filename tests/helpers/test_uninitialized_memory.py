"""Uninitialized memory is NaN in the tests of the losses: see conftest.py and helpers/uninitialized.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DEVICE
from torch import Tensor

ALLOCATIONS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "empty": lambda dtype: torch.empty(5, dtype=dtype, device=DEVICE),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(5, dtype=dtype, device=DEVICE)),
    "empty_strided": lambda dtype: torch.empty_strided((2, 2), (3, 1), dtype=dtype, device=DEVICE),
    "new_empty": lambda dtype: torch.zeros(2, device=DEVICE).new_empty(5, dtype=dtype),
    "resize_": lambda dtype: torch.zeros(0, dtype=dtype, device=DEVICE).resize_(5),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_nan(allocation: str, dtype: torch.dtype) -> None:
    assert ALLOCATIONS[allocation](dtype).isnan().all()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_are_the_largest(allocation: str, dtype: torch.dtype) -> None:
    assert (ALLOCATIONS[allocation](dtype) == torch.iinfo(dtype).max).all()
