"""Ask Linux for huge pages: else the first writes to a large new tensor cost a page fault per 4 KiB."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

from ..tracing import without_data

_MIN_BYTES = 8 << 20  # a few huge pages, of 2 MiB each


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a new tensor after advising the system to back its memory by huge pages.

    This changes nothing but speed. It does nothing off Linux, for small tensors, on other devices, and for
    tensors without memory, as under torch.export.
    """
    if without_data():
        return tensor
    storage = tensor.untyped_storage()
    if sys.platform == "linux" and tensor.device.type == "cpu" and storage.nbytes() >= _MIN_BYTES:
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise()(start, (end - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
