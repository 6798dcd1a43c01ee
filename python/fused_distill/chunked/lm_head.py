"""The LM head's products: projection to logits, and the gradients of hidden states, weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gemm import gemm, supports_fp32_output, use_onednn
from .huge_pages import in_huge_pages
from .workspace import Workspace, blocks

# A head whose dtype must be converted is multiplied in slices of the vocabulary: on a CPU in slices that fit
# its caches, on other devices where a converted copy of the head does not fit. On a CPU oneDNN multiplies
# slices too, because its results are new tensors. Otherwise whole products are faster.
_CPU_SLICE_BYTES = 4 << 20
_MAX_CPU_SLICE_ROWS = 4096
_CONVERTED_SLICE_BYTES = 16 << 20  # for callers that plan no memory for the conversion
MAX_CONVERTED_SLICE_BYTES = 256 << 20  # a product with more is as fast as one with the whole head
# Bytes of head rows that are gathered at once for a block of tokens; on a GPU enough to keep it busy.
_GATHERED_BYTES = {"cpu": 2 << 20}
_DEFAULT_GATHERED_BYTES = 128 << 20
_PITCH_ELEMENTS = 64


@dataclass(frozen=True)
class LMHead:
    """An LM head over the whole local vocabulary, multiplied in `dtype`."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype
    device_type: str
    slice_rows: int  # rows of the weight that are converted or, on a CPU, multiplied at once

    @classmethod
    def for_inputs(
        cls,
        hidden: Tensor,
        weight: Tensor,
        accumulation: torch.dtype,
        autocast: torch.dtype | None,
        device: torch.device | None = None,
    ) -> LMHead:
        """Return the head with the product dtype that inputs, autocast and the device call for.

        The device is that of the hidden states, unless tensors of another one stand in for them.
        """
        device = device or hidden.device
        dtype = autocast or torch.promote_types(hidden.dtype, weight.dtype)
        if accumulation == torch.float64 or not supports_fp32_output(device, dtype):
            dtype = accumulation
        head = cls(weight, dtype, device.type, len(weight))
        if device.type == "cpu" and (head.converts or use_onednn(device, dtype)):
            return head._sliced(min(_CPU_SLICE_BYTES, _MAX_CPU_SLICE_ROWS * head._row_bytes))
        return head._sliced(_CONVERTED_SLICE_BYTES) if head.converts else head

    @property
    def n_logits(self) -> int:
        """Return the number of logits per token."""
        return len(self.weight)

    @property
    def rows_written_by_first_chunk(self) -> int:
        """Return how many rows of the weight gradient `add_weight_gradient` overwrites in the first chunk."""
        return len(self.weight)

    @property
    def converts(self) -> bool:
        """Return True if the weight must be converted for the products."""
        return self.weight.dtype != self.dtype

    @property
    def copy_bytes(self) -> int:
        """Return the bytes of the whole weight in the products' dtype, 0 if it needs no conversion or copy.

        On a CPU the converted slice stays in its caches, which a copy of the weight would not.
        """
        return len(self.weight) * self._row_bytes if self.converts and self.device_type != "cpu" else 0

    @property
    def is_copied(self) -> bool:
        """Return True if `over` converts the whole weight at once."""
        return self.copy_bytes > 0 and self.slice_rows >= len(self.weight)

    def converting_within(self, n_bytes: int) -> LMHead:
        """Return the head with a conversion that takes at most n_bytes, but at least a row."""
        return self._sliced(n_bytes) if self.copy_bytes else self

    def over(self, weight: Tensor) -> LMHead:
        """Return the head with another weight, converted at once where the memory for this is planned."""
        return replace(self, weight=weight.to(self.dtype) if self.is_copied else weight)

    def workspace(self) -> Workspace:
        """Return the memory of the converted weight or slice of it, and of oneDNN's product with a slice."""
        width, slice_rows = self.weight.shape[1], min(self.slice_rows, len(self.weight))
        onednn = use_onednn(torch.device(self.device_type), self.dtype)
        return Workspace(
            fixed=(self.converts + onednn) * slice_rows * self._row_bytes,
            per_row=max(slice_rows, width) * self.dtype.itemsize if onednn else 0,
        )

    @property
    def _row_bytes(self) -> int:
        return self.weight.shape[1] * self.dtype.itemsize

    def _sliced(self, n_bytes: int) -> LMHead:
        return replace(self, slice_rows=max(1, min(n_bytes // self._row_bytes, len(self.weight))))

    def _vocab_slices(self, *, reads_weight: bool = True) -> Iterator[slice]:
        sliced = self.device_type == "cpu" or (reads_weight and self.converts)
        return blocks(len(self.weight), self.slice_rows if sliced else len(self.weight))

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
        for columns in self._vocab_slices(reads_weight=False):
            gemm(grad[:, columns].T, hidden, out[columns], accumulate=not overwrite)

    def add_bias_gradient(self, grad: Tensor, out: Tensor) -> None:
        """Add the column sums of grad to out[:V]."""
        out[: len(self.weight)] += grad.sum(0, dtype=out.dtype)


@dataclass(frozen=True)
class IndexedLMHead:
    """The LM head's rows at K ids per token of one chunk, without a product over the vocabulary."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype
    device_type: str
    ids: Tensor  # (n, K) int64 of a chunk; (0, K) before the first chunk
    block_rows: int = 1  # tokens whose head rows are gathered at once
    rows_written_by_first_chunk: int = 0  # gradients are added to zeros

    @property
    def n_logits(self) -> int:
        """Return the number of logits per token, K."""
        return self.ids.shape[1]

    def over(self, weight: Tensor) -> IndexedLMHead:
        """Return the head with another weight."""
        return replace(self, weight=weight)

    def at(self, ids: Tensor, block_rows: int) -> IndexedLMHead:
        """Return the head for the ids of a chunk."""
        return replace(self, ids=ids, block_rows=block_rows)

    def workspace(self) -> Workspace:
        """Return the memory of a block's gathered rows, before and after conversion to dtype."""
        elements = self.n_logits * self.weight.shape[1]
        unconverted = self.weight.dtype.itemsize if self.weight.dtype != self.dtype else 0
        block_bytes = _GATHERED_BYTES.get(self.device_type, _DEFAULT_GATHERED_BYTES)
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


def row_bytes(columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the distance in bytes between the rows of a `logit_buffer`.

    It is a multiple of 64 elements, because GPUs read and multiply rows that start at odd addresses several
    times slower. On a CPU there are 64 bytes more: vocabulary sizes are often multiples of a power of two,
    and such row strides cause cache-set conflicts.
    """
    elements = -(-columns // _PITCH_ELEMENTS) * _PITCH_ELEMENTS
    return elements * dtype.itemsize + (64 if device_type == "cpu" else 0)


def logit_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised (rows, columns) tensor whose rows are `row_bytes` apart."""
    pitch = row_bytes(columns, dtype, device.type) // dtype.itemsize
    return in_huge_pages(torch.empty(rows, pitch, dtype=dtype, device=device))[:, :columns]
