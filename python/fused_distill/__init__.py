"""Fused-kernel losses for distilling language models.

`fused_linear_jsd` compares a student with a full-vocabulary teacher, `fused_linear_topk_jsd` with one that is
known at K tokens per position, without holding either model's logits. `topk_logprobs` gives those K. `plan`
tells what a call would allocate and compute.
"""

from . import reference
from .linear_jsd import FusedLinearJSDLoss, fused_linear_jsd
from .linear_topk_jsd import FusedLinearTopKJSDLoss, fused_linear_topk_jsd
from .plan import LossPlan, plan
from .stats import DistillStats
from .topk_logprobs import TopKLogprobs, topk_logprobs

__all__ = [
    "DistillStats",
    "FusedLinearJSDLoss",
    "FusedLinearTopKJSDLoss",
    "LossPlan",
    "TopKLogprobs",
    "fused_linear_jsd",
    "fused_linear_topk_jsd",
    "plan",
    "reference",
    "topk_logprobs",
]
__version__ = "0.1.0"
