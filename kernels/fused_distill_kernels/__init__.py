"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .jsd import jsd_rows
from .tail import tail_gradient, tail_sums

__all__ = ["jsd_rows", "tail_gradient", "tail_sums"]
