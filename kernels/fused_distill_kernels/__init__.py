"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .jsd import jsd_rows
from .tail import rest_gradients, rest_sums

__all__ = ["jsd_rows", "rest_gradients", "rest_sums"]
