"""Triton kernels of fused-distill: raw tensors in, raw tensors out."""

from .indexed import add_indexed_weight_gradient, indexed_back_project, indexed_project
from .jsd_launch import JSDKernels
from .support import support_loss
from .support_columns import put_support, take_support, unique_entries
from .tail import tail_gradient, tail_sums

__all__ = [
    "JSDKernels",
    "add_indexed_weight_gradient",
    "indexed_back_project",
    "indexed_project",
    "put_support",
    "support_loss",
    "tail_gradient",
    "tail_sums",
    "take_support",
    "unique_entries",
]
