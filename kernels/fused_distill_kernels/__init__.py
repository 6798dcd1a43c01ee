"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .divergence import jsd_rows
from .rest import rest_gradients, rest_sums

__all__ = ["jsd_rows", "rest_gradients", "rest_sums"]
