"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .divergence import jsd_rows

__all__ = ["jsd_rows"]
