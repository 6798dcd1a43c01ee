"""The teacher's side of a loss: hidden states with an LM head, or log-probabilities at K ids per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..parallel.vocab_shard import VocabShard
from ..rows.base import TeacherRows
from .gemm import float64_if_supported
from .lm_head import LMHead, logit_buffer
from .workspace import Workspace

ReadRows = Callable[["slice | Tensor"], TeacherRows]  # from the tokens of a chunk

_NO_ID = torch.iinfo(torch.int64).max


class Teacher(Protocol):
    """A source of `TeacherRows`."""

    def workspace(self, n_columns: int, dtype: torch.dtype, autocast: torch.dtype | None) -> Workspace:
        """Return the memory that reading a chunk needs, for n_columns local columns."""
        ...

    def reader(
        self, shard: VocabShard, max_rows: int, dtype: torch.dtype, autocast: torch.dtype | None
    ) -> ReadRows:
        """Return a function that reads a chunk of at most max_rows tokens, valid until the next call."""
        ...


@dataclass(frozen=True)
class FullTeacher:
    """A full-vocabulary teacher: last hidden states and an LM head, projected chunk by chunk."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (Vt, Dt)
    bias: Tensor | None  # (Vt,)

    def workspace(self, n_columns: int, dtype: torch.dtype, autocast: torch.dtype | None) -> Workspace:
        """Return the memory of the logits, the hidden states of a chunk and the head's products."""
        weight = self.weight[:1].expand(n_columns, -1)
        head = LMHead.for_inputs(self.hidden, weight, dtype, autocast)
        row_bytes = (n_columns + self.hidden.shape[-1]) * dtype.itemsize
        return Workspace(fixed=head.workspace().fixed, per_row=row_bytes)

    def reader(
        self, shard: VocabShard, max_rows: int, dtype: torch.dtype, autocast: torch.dtype | None
    ) -> ReadRows:
        """Return a function that projects a chunk to logits, in a buffer that all chunks share."""
        head = LMHead.for_inputs(self.hidden, self.weight[: shard.size], dtype, autocast)
        bias = None if self.bias is None else self.bias[: shard.size].to(dtype)
        buffer = logit_buffer(max_rows, shard.size, dtype, self.hidden.device)

        def read(tokens: slice | Tensor) -> TeacherRows:
            hidden = self.hidden[tokens].to(head.dtype)
            return TeacherRows(head.project(hidden, buffer[: len(hidden)]), bias)

        return read


@dataclass(frozen=True)
class TopKTeacher:
    """Log-probabilities at K ids per token; an id that occurs twice counts once."""

    logprobs: Tensor  # (N, K), -inf where absent
    ids: Tensor  # (N, K) int

    def workspace(self, n_columns: int, dtype: torch.dtype, autocast: torch.dtype | None) -> Workspace:
        """Return the memory of sorted ids and log-probabilities and of the sort's temporaries."""
        del n_columns, dtype, autocast
        return Workspace(per_row=64 * self.ids.shape[-1])

    def reader(
        self, shard: VocabShard, max_rows: int, dtype: torch.dtype, autocast: torch.dtype | None
    ) -> ReadRows:
        """Return a function that sorts a chunk's entries by id and keeps the first of duplicates."""
        del max_rows, dtype, autocast

        def read(tokens: slice | Tensor) -> TeacherRows:
            logprobs, ids = self.logprobs[tokens], self.ids[tokens].long()
            absent = logprobs == -torch.inf
            ids, order = ids.masked_fill(absent, _NO_ID).sort(dim=-1, stable=True)
            logprobs = logprobs.gather(-1, order).to(float64_if_supported(logprobs.device))
            repeated = torch.zeros_like(absent)
            repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
            logprobs.masked_fill_(repeated, -torch.inf)
            first = ids[:, :1]
            first = torch.where(first == _NO_ID, 0, first)  # a row without any entry
            ids = torch.where(logprobs == -torch.inf, first, ids)
            if not shard.is_sharded:
                return TeacherRows(logprobs, ids=ids)
            ids, is_local = shard.to_local(ids)
            return TeacherRows(logprobs, ids=ids, is_local=is_local)

        return read
