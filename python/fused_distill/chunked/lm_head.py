"""The LM head's products: projection to logits, and the gradients of hidden states, weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gemm import gemm, supports_fp32_output, use_onednn
from .workspace import Workspace, blocks

# On a CPU products run on slices of the vocabulary that fit its caches. On other devices only a head whose
# dtype must be converted is sliced.
_SLICE_BYTES = {"cpu": 4 << 20}
_DEFAULT_SLICE_BYTES = 16 << 20
_MAX_SLICE_ROWS = {"cpu": 4096}
# Bytes of head rows that are gathered at once for a block of tokens; on a GPU enough to keep it busy.
_GATHERED_BYTES = {"cpu": 2 << 20}
_DEFAULT_GATHERED_BYTES = 128 << 20


@dataclass(frozen=True)
class LMHead:
    """An LM head over the whole local vocabulary, multiplied in `dtype`."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype

    @classmethod
    def for_inputs(
        cls, hidden: Tensor, weight: Tensor, accumulation: torch.dtype, autocast: torch.dtype | None
    ) -> LMHead:
        """Return the head with the product dtype that inputs, autocast and the device call for."""
        dtype = autocast or torch.promote_types(hidden.dtype, weight.dtype)
        if accumulation == torch.float64 or not supports_fp32_output(hidden.device, dtype):
            dtype = accumulation
        return cls(weight, dtype)

    @property
    def n_logits(self) -> int:
        """Return the number of logits per token."""
        return len(self.weight)

    @property
    def rows_written_by_first_chunk(self) -> int:
        """Return how many rows of the weight gradient `add_weight_gradient` overwrites in the first chunk."""
        return len(self.weight)

    def workspace(self) -> Workspace:
        """Return the memory of a converted slice of the weight and of oneDNN's product with it."""
        width, slice_rows = self.weight.shape[1], self._slice_rows
        slice_bytes = slice_rows * width * self.dtype.itemsize
        onednn = use_onednn(self.weight.device, self.dtype)
        return Workspace(
            fixed=((self.weight.dtype != self.dtype) + onednn) * slice_bytes,
            per_row=max(slice_rows, width) * self.dtype.itemsize if onednn else 0,
        )

    @property
    def _slice_rows(self) -> int:
        device, row_bytes = self.weight.device.type, self.weight.shape[1] * self.dtype.itemsize
        rows = _SLICE_BYTES.get(device, _DEFAULT_SLICE_BYTES) // row_bytes
        return max(1, min(rows, _MAX_SLICE_ROWS.get(device, rows), len(self.weight)))

    def _vocab_slices(self) -> Iterator[slice]:
        sliced = self.weight.device.type == "cpu" or self.weight.dtype != self.dtype
        return blocks(len(self.weight), self._slice_rows if sliced else len(self.weight))

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Compute out (n, V) = hidden (n, D) @ weight^T."""
        for columns in self._vocab_slices():
            gemm(hidden, self.weight[columns].to(self.dtype).T, out[:, columns])
        return out

    def back_project(self, grad: Tensor, out: Tensor) -> Tensor:
        """Compute out (n, D) = grad (n, V) @ weight."""
        for columns in self._vocab_slices():
            gemm(grad[:, columns], self.weight[columns].to(self.dtype), out, accumulate=columns.start > 0)
        return out

    def add_weight_gradient(self, grad: Tensor, hidden: Tensor, out: Tensor, *, overwrite: bool) -> None:
        """Compute out[:V] = grad^T (V, n) @ hidden (n, D) if overwrite, else add it."""
        for columns in self._vocab_slices():
            gemm(grad[:, columns].T, hidden, out[columns], accumulate=not overwrite)

    def add_bias_gradient(self, grad: Tensor, out: Tensor) -> None:
        """Add the column sums of grad to out[:V]."""
        out[: len(self.weight)] += grad.sum(0, dtype=out.dtype)


@dataclass(frozen=True)
class IndexedLMHead:
    """The LM head's rows at K ids per token of one chunk, without a product over the vocabulary."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype
    ids: Tensor  # (n, K) int64 of a chunk; (0, K) before the first chunk
    block_rows: int = 1  # tokens whose head rows are gathered at once
    rows_written_by_first_chunk: int = 0  # gradients are added to zeros

    @property
    def n_logits(self) -> int:
        """Return the number of logits per token, K."""
        return self.ids.shape[1]

    def at(self, ids: Tensor, block_rows: int) -> IndexedLMHead:
        """Return the head for the ids of a chunk."""
        return replace(self, ids=ids, block_rows=block_rows)

    def workspace(self) -> Workspace:
        """Return the memory of a block's gathered rows, before and after conversion to dtype."""
        elements = self.n_logits * self.weight.shape[1]
        unconverted = self.weight.dtype.itemsize if self.weight.dtype != self.dtype else 0
        block_bytes = _GATHERED_BYTES.get(self.weight.device.type, _DEFAULT_GATHERED_BYTES)
        return Workspace(
            per_block_row=elements * (self.dtype.itemsize + unconverted),
            block_rows=max(1, block_bytes // (elements * self.dtype.itemsize)),
        )

    def _gathered(self, block: slice) -> Tensor:
        return self.weight[self.ids[block]].to(self.dtype)  # (rows of the block, K, D)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Compute out[n, k] = hidden[n] . weight[ids[n, k]]."""
        for block in blocks(len(out), self.block_rows):
            torch.bmm(self._gathered(block), hidden[block].unsqueeze(-1), out=out[block].unsqueeze(-1))
        return out

    def back_project(self, grad: Tensor, out: Tensor) -> Tensor:
        """Compute out[n] = sum over k of grad[n, k] weight[ids[n, k]]."""
        for block in blocks(len(out), self.block_rows):
            torch.bmm(grad[block].unsqueeze(1), self._gathered(block), out=out[block].unsqueeze(1))
        return out

    def add_weight_gradient(self, grad: Tensor, hidden: Tensor, out: Tensor, *, overwrite: bool) -> None:
        """Compute out[ids[n, k]] += grad[n, k] hidden[n]; out must be initialised."""
        del overwrite
        for block in blocks(len(grad), self.block_rows):
            terms = grad[block].unsqueeze(-1) * hidden[block].unsqueeze(1)
            out.index_add_(0, self.ids[block].flatten(), terms.flatten(0, 1))

    def add_bias_gradient(self, grad: Tensor, out: Tensor) -> None:
        """Compute out[ids[n, k]] += grad[n, k]."""
        out.index_add_(0, self.ids.flatten(), grad.flatten())


def logit_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised (rows, columns) tensor.

    On a CPU rows are 64 bytes further apart than their length. Vocabulary sizes are often multiples of a
    power of two, and such row strides cause cache-set conflicts.
    """
    padding = 64 // dtype.itemsize if device.type == "cpu" else 0
    return torch.empty(rows, columns + padding, dtype=dtype, device=device)[:, :columns]
