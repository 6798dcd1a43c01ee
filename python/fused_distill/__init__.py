"""Fused-kernel losses for distilling language models.

`fused_linear_jsd` compares a student with a full-vocabulary teacher without holding either model's logits.
"""

from . import reference
from ._settings import DistillStats
from .linear_jsd import FusedLinearJSDLoss, fused_linear_jsd

__all__ = ["DistillStats", "FusedLinearJSDLoss", "fused_linear_jsd", "reference"]
__version__ = "0.1.0"
