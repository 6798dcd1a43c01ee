"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .jsd_launch import JSDKernels
from .tail import tail_gradient, tail_sums

__all__ = ["JSDKernels", "tail_gradient", "tail_sums"]
