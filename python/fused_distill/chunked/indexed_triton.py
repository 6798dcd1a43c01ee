"""The LM head's products at K ids per token by Triton kernels, which read the head in its own dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from fused_distill_kernels import add_indexed_weight_gradient, indexed_back_project, indexed_project
from torch import Tensor

from .lm_head import IndexedLMHead
from .workspace import Workspace


@dataclass(frozen=True)
class TritonIndexedLMHead(IndexedLMHead):
    """`IndexedLMHead` by kernels. A negative id counts as absent."""

    def workspace(self) -> Workspace:
        """Return the memory of the sorted ids."""
        return Workspace(per_row=64 * self.n_logits)

    @cached_property
    def _sorted_ids(self) -> tuple[Tensor, Tensor]:
        sorted_ids, order = self.ids.flatten().sort(stable=True)
        return sorted_ids, order

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Compute out[n, k] = hidden[n] . weight[ids[n, k]], 0 where absent."""
        indexed_project(hidden, self.weight, self.ids, out)
        return out

    def back_project(self, grad: Tensor, out: Tensor) -> Tensor:
        """Compute out[n] = sum over k of grad[n, k] weight[ids[n, k]]."""
        indexed_back_project(grad, self.weight, self.ids, out)
        return out

    def add_weight_gradient(self, grad: Tensor, hidden: Tensor, out: Tensor, *, overwrite: bool) -> None:
        """Compute out[ids[n, k]] += grad[n, k] hidden[n]; out must be initialised."""
        del overwrite
        add_indexed_weight_gradient(grad, hidden, *self._sorted_ids, out)

    def add_bias_gradient(self, grad: Tensor, out: Tensor) -> None:
        """Compute out[ids[n, k]] += grad[n, k]."""
        ones = torch.ones(len(grad), 1, dtype=grad.dtype, device=grad.device)
        add_indexed_weight_gradient(grad, ones, *self._sorted_ids, out.unsqueeze(1))
