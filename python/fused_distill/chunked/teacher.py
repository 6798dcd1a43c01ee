"""The teacher's side of a loss: hidden states with an LM head, or log-probabilities at K ids per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..parallel.dtensor import gather_dtensor
from ..parallel.vocab_shard import VocabShard
from ..rows.base import TeacherRows
from ..validation import (
    FORBIDDEN_LOGPROB,
    check_hidden_and_head,
    check_id_range,
    check_logprobs,
    check_probabilities,
    check_support,
)
from .gemm import float64_if_supported
from .lm_head import LMHead, logit_buffer, row_bytes
from .workspace import Workspace

ReadRows = Callable[["slice | Tensor"], TeacherRows]  # from the tokens of a chunk

_NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class FullTeacher:
    """A full-vocabulary teacher: last hidden states and an LM head, projected chunk by chunk."""

    hidden: Tensor  # (..., Dt); (N, Dt) once prepared
    weight: Tensor  # (Vt, Dt)
    bias: Tensor | None  # (Vt,)
    k: None = None

    @property
    def products(self) -> dict[str, Tensor]:
        """Return the tensors that enter matrix products, by argument name."""
        return {"teacher_hidden": self.hidden, "teacher_weight": self.weight}

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Return all tensors by argument name."""
        return {**self.products, "teacher_bias": self.bias}

    def check(self, student_hidden: Tensor) -> None:
        """Require hidden states and an LM head that fit each other and the student's tokens."""
        check_hidden_and_head("teacher_", self.hidden, self.weight, self.bias, student_hidden.device)
        if self.hidden.shape[:-1] != student_hidden.shape[:-1]:
            raise ValueError(
                "teacher_hidden must have the tokens of student_hidden, "
                f"got {tuple(self.hidden.shape)} and {tuple(student_hidden.shape)}"
            )

    def prepare(self, shard: VocabShard, mask: Tensor | None) -> FullTeacher:
        """Return the detached teacher with flattened tokens and gathered DTensors."""
        del shard, mask
        hidden = self.hidden.detach().reshape(-1, self.hidden.shape[-1])
        bias = None if self.bias is None else gather_dtensor(self.bias.detach())
        return FullTeacher(hidden, gather_dtensor(self.weight.detach()), bias)

    def head(
        self,
        n_columns: int,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        device: torch.device | None = None,
    ) -> LMHead:
        """Return the head of n_columns columns, which is for sizes only: all its rows are the first one."""
        weight = self.weight[:1].expand(n_columns, -1)
        return LMHead.for_inputs(self.hidden, weight, dtype, autocast, device)

    def workspaces(self, n_columns: int, dtype: torch.dtype, device_type: str) -> dict[str, Workspace]:
        """Return the memory of a chunk's logits and hidden states, by name."""
        return {
            "teacher logits": Workspace(per_row=row_bytes(n_columns, dtype, device_type)),
            "teacher hidden states": Workspace(per_row=self.hidden.shape[-1] * dtype.itemsize),
        }

    def reader(
        self,
        shard: VocabShard,
        max_rows: int,
        dtype: torch.dtype,
        head: LMHead | None,
        *,
        use_kernels: bool,
    ) -> ReadRows:
        """Return a function that projects at most max_rows tokens at a time by the head, into one buffer."""
        del use_kernels
        assert head is not None
        head = head.over(self.weight[: shard.size])
        bias = None if self.bias is None else self.bias[: shard.size].to(dtype).contiguous()
        buffer = logit_buffer(max_rows, shard.size, dtype, self.hidden.device)

        def read(tokens: slice | Tensor) -> TeacherRows:
            hidden = self.hidden[tokens].to(head.dtype)
            return TeacherRows(head.project(hidden, buffer[: len(hidden)]), bias)

        return read


@dataclass(frozen=True)
class TopKTeacher:
    """Log-probabilities at K ids per token; an id that occurs twice counts once."""

    logprobs: Tensor  # (..., K), FORBIDDEN_LOGPROB or less where absent; (N, K) once prepared
    ids: Tensor  # (..., K) int

    @property
    def k(self) -> int:
        """Return the size of the support."""
        return self.ids.shape[-1]

    @property
    def products(self) -> dict[str, Tensor]:
        """Return the tensors that enter matrix products: none."""
        return {}

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Return all tensors by argument name."""
        return {"teacher_logprobs": self.logprobs, "teacher_ids": self.ids}

    def check(self, student_hidden: Tensor) -> None:
        """Require log-probabilities and ids in the shape of the student's tokens."""
        check_support(self.logprobs, self.ids, student_hidden.shape[:-1], student_hidden.device)

    def prepare(self, shard: VocabShard, mask: Tensor | None) -> TopKTeacher:
        """Check the range of the ids, and return the detached teacher with flattened tokens."""
        absent = self.logprobs <= FORBIDDEN_LOGPROB
        check_id_range("teacher_ids", self.ids, shard.total, unused=absent, mask=mask)
        check_logprobs(self.logprobs, mask)
        return TopKTeacher(self.logprobs.detach().reshape(-1, self.k), self.ids.reshape(-1, self.k))

    def head(
        self,
        n_columns: int,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        device: torch.device | None = None,
    ) -> None:
        """Return None: a top-k teacher has no head."""
        del n_columns, dtype, autocast, device

    def workspaces(self, n_columns: int, dtype: torch.dtype, device_type: str) -> dict[str, Workspace]:
        """Return the memory of sorted ids and log-probabilities and of the sort's temporaries, by name."""
        del n_columns, dtype, device_type
        return {"teacher support": Workspace(per_row=64 * self.ids.shape[-1])}

    def reader(
        self,
        shard: VocabShard,
        max_rows: int,
        dtype: torch.dtype,
        head: LMHead | None,
        *,
        use_kernels: bool,
    ) -> ReadRows:
        """Return a function that reads a chunk's entries and keeps the first of duplicates."""
        del max_rows, dtype, head
        if use_kernels:
            return partial(self._read_by_kernel, shard)

        def read(tokens: slice | Tensor) -> TeacherRows:
            logprobs, ids = self.logprobs[tokens], self.ids[tokens].long()
            absent = logprobs <= FORBIDDEN_LOGPROB
            ids, order = ids.masked_fill(absent, _NO_ID).sort(dim=-1, stable=True)
            logprobs = logprobs.gather(-1, order).to(float64_if_supported(logprobs.device))
            repeated = torch.zeros_like(absent)
            repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
            logprobs.masked_fill_(repeated | (ids == _NO_ID), -torch.inf)
            check_probabilities(logprobs, self.logprobs.dtype)
            first = ids[:, :1]
            first = torch.where(first == _NO_ID, 0, first)  # a row without any entry
            ids = torch.where(logprobs == -torch.inf, first, ids)
            if not shard.is_sharded:
                return TeacherRows(logprobs, ids=ids)
            ids, is_local = shard.to_local(ids)
            return TeacherRows(logprobs, ids=ids, is_local=is_local)

        return read

    def _read_by_kernel(self, shard: VocabShard, tokens: slice | Tensor) -> TeacherRows:
        from fused_distill_kernels import unique_entries  # needs Triton

        if isinstance(tokens, slice):
            rows = (self.ids[tokens], self.logprobs[tokens], None)
        else:
            rows = (self.ids, self.logprobs, tokens)
        columns, logprobs = unique_entries(*rows, shard.start, shard.size)
        return TeacherRows(logprobs, ids=columns)


Teacher = FullTeacher | TopKTeacher
