"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""
