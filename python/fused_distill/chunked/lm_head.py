"""The student's and the teacher's output layers, multiplied in tiles; what is multiplied with what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .gemm import multiplies_into_float32, multiply, onednn_multiplies
from .workspace import blocks

# A CPU multiplies tile by tile, of a size that fits its caches. Elsewhere only a head that must be converted
# is cut.
_TILE_BYTES = {"cpu": 4 << 20}
_DEFAULT_TILE_BYTES = 16 << 20
_TILE_COLUMNS = {"cpu": 4096}
# The same for rows gathered for a block of tokens; on a GPU a block that keeps it busy.
_GATHERED_BYTES = {"cpu": 2 << 20}
_DEFAULT_GATHERED_BYTES = 128 << 20


class StudentHead(Protocol):
    """How the student's logits are made of a chunk's hidden states, and their gradient's way back."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products' operands."""
        ...

    @property
    def n_columns(self) -> int:
        """Logits per token."""
        ...

    @property
    def fixed_bytes(self) -> int:
        """Temporary bytes whatever the chunk."""
        ...

    @property
    def row_bytes(self) -> int:
        """Temporary bytes per token of a chunk, logits apart."""
        ...

    @property
    def block_rows(self) -> int:
        """Tokens of a chunk that are multiplied at once; 0: all."""
        ...

    @property
    def block_row_bytes(self) -> int:
        """Temporary bytes per token of such a block."""
        ...

    def project(self, hidden: Tensor, out: Tensor, ids: Tensor | None) -> Tensor:
        """out (n, n_columns) = the logits before the bias. `ids` (n, K) is the teacher's support, if any."""
        ...

    def back_project(self, grad: Tensor, out: Tensor, ids: Tensor | None) -> Tensor:
        """out (n, D) = gradient of the hidden states, for grad (n, n_columns)."""
        ...

    def add_weight_gradient(
        self, grad: Tensor, hidden: Tensor, out: Tensor, ids: Tensor | None, *, first: bool
    ) -> None:
        """Add to out (V, D), whose first `overwritten_rows` rows hold nothing yet if `first`."""
        ...

    def add_bias_gradient(self, grad: Tensor, out: Tensor, ids: Tensor | None) -> None:
        """Add to out (V,)."""
        ...

    @property
    def overwritten_rows(self) -> int:
        """Rows of the weight gradient that the first chunk writes; the others start as zeros."""
        ...


@dataclass(frozen=True)
class Head:
    """The compared rows of one output layer, multiplied in `dtype`, converted tile by tile if need be."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, accumulation: torch.dtype, autocast: torch.dtype | None
    ) -> Head:
        """The head with the product dtype that suits the inputs, autocast and the device."""
        dtype = autocast or torch.promote_types(hidden.dtype, weight.dtype)
        if accumulation == torch.float64 or not multiplies_into_float32(hidden.device, dtype):
            dtype = accumulation
        return cls(weight, dtype)

    @property
    def n_columns(self) -> int:
        """Logits per token."""
        return len(self.weight)

    @property
    def block_rows(self) -> int:
        """No need of blocks."""
        return 0

    @property
    def block_row_bytes(self) -> int:
        """Nothing."""
        return 0

    @property
    def overwritten_rows(self) -> int:
        """All compared rows."""
        return len(self.weight)

    @property
    def fixed_bytes(self) -> int:
        """Temporary bytes of a converted tile and of a product with it."""
        n_bytes = self._tile_rows * self.weight.shape[1] * self.dtype.itemsize
        converted = self.weight.dtype != self.dtype
        return (converted + onednn_multiplies(self.weight.device, self.dtype)) * n_bytes

    @property
    def row_bytes(self) -> int:
        """Of a product with a tile."""
        if not onednn_multiplies(self.weight.device, self.dtype):
            return 0
        return max(self._tile_rows, self.weight.shape[1]) * self.dtype.itemsize

    @property
    def _tile_rows(self) -> int:
        device = self.weight.device.type
        rows = _TILE_BYTES.get(device, _DEFAULT_TILE_BYTES) // (self.weight.shape[1] * self.dtype.itemsize)
        return max(1, min(rows, _TILE_COLUMNS.get(device, rows), len(self.weight)))

    def _tiles(self) -> Iterator[slice]:
        """Columns of the logits that are multiplied at once."""
        cut = self.weight.device.type == "cpu" or self.weight.dtype != self.dtype
        step = self._tile_rows if cut else len(self.weight)
        return blocks(len(self.weight), step)

    def project(self, hidden: Tensor, out: Tensor, ids: Tensor | None = None) -> Tensor:
        """out (n, V) = hidden (n, D) @ weight^T."""
        for columns in self._tiles():
            multiply(hidden, self.weight[columns].to(self.dtype).T, out[:, columns])
        return out

    def back_project(self, grad: Tensor, out: Tensor, ids: Tensor | None = None) -> Tensor:
        """out (n, D) = grad (n, V) @ weight."""
        for columns in self._tiles():
            tile = self.weight[columns].to(self.dtype)
            multiply(grad[:, columns], tile, out, accumulate=columns.start > 0)
        return out

    def add_weight_gradient(
        self, grad: Tensor, hidden: Tensor, out: Tensor, ids: Tensor | None, *, first: bool
    ) -> None:
        """out[:V] (+)= grad^T (V, n) @ hidden (n, D)."""
        for columns in self._tiles():
            multiply(grad[:, columns].T, hidden, out[columns], accumulate=not first)

    def add_bias_gradient(self, grad: Tensor, out: Tensor, ids: Tensor | None) -> None:
        """out[:V] += column sums of grad."""
        out[: len(self.weight)] += grad.sum(0, dtype=out.dtype)


@dataclass(frozen=True)
class GatheredHead:
    """K rows of the output layer per token, chosen by ids: no product over the vocabulary."""

    weight: Tensor  # (V, D)
    dtype: torch.dtype  # of the accumulation, too
    n_columns: int  # K
    block_rows: int  # tokens whose rows are gathered at once

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, k: int, block_rows: int | None) -> GatheredHead:
        """The head with this block, by default one of a size that suits the device."""
        block_bytes = _GATHERED_BYTES.get(weight.device.type, _DEFAULT_GATHERED_BYTES)
        suitable = max(1, block_bytes // (k * weight.shape[1] * dtype.itemsize))
        return cls(weight, dtype, k, block_rows or suitable)

    @property
    def overwritten_rows(self) -> int:
        """None: gradients are scattered into zeros."""
        return 0

    @property
    def fixed_bytes(self) -> int:
        """Nothing."""
        return 0

    @property
    def row_bytes(self) -> int:
        """Nothing but the logits."""
        return 0

    @property
    def block_row_bytes(self) -> int:
        """A token's gathered rows, as they are and converted."""
        gathered = self.weight.dtype.itemsize if self.weight.dtype != self.dtype else 0
        return self.n_columns * self.weight.shape[1] * (self.dtype.itemsize + gathered)

    def _rows(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.dtype)  # (n, K, D)

    def project(self, hidden: Tensor, out: Tensor, ids: Tensor | None) -> Tensor:
        """out[n, k] = hidden[n] . weight[ids[n, k]]."""
        assert ids is not None
        for block in blocks(len(out), self.block_rows):
            torch.bmm(self._rows(ids[block]), hidden[block].unsqueeze(-1), out=out[block].unsqueeze(-1))
        return out

    def back_project(self, grad: Tensor, out: Tensor, ids: Tensor | None) -> Tensor:
        """out[n] = sum over k of grad[n, k] weight[ids[n, k]]."""
        assert ids is not None
        for block in blocks(len(out), self.block_rows):
            torch.bmm(grad[block].unsqueeze(1), self._rows(ids[block]), out=out[block].unsqueeze(1))
        return out

    def add_weight_gradient(
        self, grad: Tensor, hidden: Tensor, out: Tensor, ids: Tensor | None, *, first: bool
    ) -> None:
        """out[ids[n, k]] += grad[n, k] hidden[n]."""
        assert ids is not None
        for block in blocks(len(grad), self.block_rows):
            terms = grad[block].unsqueeze(-1) * hidden[block].unsqueeze(1)
            out.index_add_(0, ids[block].flatten(), terms.flatten(0, 1))

    def add_bias_gradient(self, grad: Tensor, out: Tensor, ids: Tensor | None) -> None:
        """out[ids[n, k]] += grad[n, k]."""
        assert ids is not None
        out.index_add_(0, ids.flatten(), grad.flatten())


def logit_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns). On the CPU 64 bytes lie between rows: at a distance of a power of two, as most
    vocabularies give, all rows compete for the same places in the caches."""
    padding = 64 // dtype.itemsize if device.type == "cpu" else 0
    return torch.empty(rows, columns + padding, dtype=dtype, device=device)[:, :columns]
