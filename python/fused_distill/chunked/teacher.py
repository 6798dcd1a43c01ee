"""The teacher's side of a loss: hidden states and a head, or log-probabilities at K ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..parallel.vocab_shard import Vocabulary
from .lm_head import Head


class TeacherRows(NamedTuple):
    """A chunk of tokens as the teacher sees them."""

    values: Tensor  # (n, V) logits as projected; with ids (n, K) log-probabilities, -inf where absent
    bias: Tensor | None = None  # (V,) of the logits
    ids: Tensor | None = None  # (n, K) int64 columns; an absent entry repeats an id of its row
    here: Tensor | None = None  # (n, K) bool: False where another rank holds the column; None: all are here


class Teacher(Protocol):
    """Where TeacherRows come from."""

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """Tensors whose dtypes decide what the loss is accumulated in."""
        ...

    def buffer_columns(self, vocab_size: int) -> int:
        """Logits per token that `read` wants a buffer for."""
        ...

    def fixed_bytes(self, vocab_size: int, accumulation: torch.dtype, autocast: torch.dtype | None) -> int:
        """Temporary bytes whatever the chunk."""
        ...

    def row_bytes(self, accumulation: torch.dtype) -> int:
        """Temporary bytes per token of a chunk, the buffer apart."""
        ...

    def read(self, tokens: slice | Tensor, buffer: Tensor, autocast: torch.dtype | None) -> TeacherRows:
        """The rows of `tokens`; buffer is (n, buffer_columns) in the accumulation dtype."""
        ...


@dataclass(frozen=True)
class FullTeacher:
    """Last hidden states and output head, projected chunk by chunk."""

    hidden: Tensor  # (N, Dt)
    weight: Tensor  # (Vt, Dt)
    bias: Tensor | None  # (Vt,)

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """Hidden states and head."""
        return self.hidden, self.weight

    def buffer_columns(self, vocab_size: int) -> int:
        """The whole vocabulary."""
        return vocab_size

    def fixed_bytes(self, vocab_size: int, accumulation: torch.dtype, autocast: torch.dtype | None) -> int:
        """A converted tile of the head."""
        weight = self.weight[:1].expand(vocab_size, -1)
        return Head.of(self.hidden, weight, accumulation, autocast).fixed_bytes

    def row_bytes(self, accumulation: torch.dtype) -> int:
        """A gathered or converted hidden state."""
        return self.hidden.shape[-1] * accumulation.itemsize

    def read(self, tokens: slice | Tensor, buffer: Tensor, autocast: torch.dtype | None) -> TeacherRows:
        """Logits in the buffer, by one product."""
        vocab_size = buffer.shape[1]
        head = Head.of(self.hidden, self.weight[:vocab_size], buffer.dtype, autocast)
        logits = head.project(self.hidden[tokens].to(head.dtype), buffer)
        return TeacherRows(logits, None if self.bias is None else self.bias[:vocab_size].to(buffer.dtype))


@dataclass(frozen=True)
class TopKTeacher:
    """Log-probabilities at K ids per token, each id counted once."""

    logprobs: Tensor  # (N, K), -inf where absent
    ids: Tensor  # (N, K) int
    vocabulary: Vocabulary

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """None: log-probabilities in float64 do not make a float32 student's loss float64."""
        return ()

    def buffer_columns(self, vocab_size: int) -> int:
        """Nothing is projected."""
        return 0

    def fixed_bytes(self, vocab_size: int, accumulation: torch.dtype, autocast: torch.dtype | None) -> int:
        """Nothing."""
        return 0

    def row_bytes(self, accumulation: torch.dtype) -> int:
        """Sorted ids and log-probabilities, and what the sort holds meanwhile."""
        return 64 * self.ids.shape[-1]

    def read(self, tokens: slice | Tensor, buffer: Tensor, autocast: torch.dtype | None) -> TeacherRows:
        """Entries in the order of their ids; of several with one id, the first stays present."""
        logprobs, ids = self.logprobs[tokens], self.ids[tokens].long()
        absent = logprobs == -torch.inf
        ids, order = ids.masked_fill(absent, torch.iinfo(torch.int64).max).sort(dim=-1, stable=True)
        logprobs = logprobs.gather(-1, order).to(wide_dtype(logprobs.device))
        repeated = torch.zeros_like(absent)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        logprobs.masked_fill_(repeated, -torch.inf)
        first = ids[:, :1]
        first = torch.where(first == torch.iinfo(torch.int64).max, 0, first)  # a row without any entry
        ids = torch.where(logprobs == -torch.inf, first, ids)
        if self.vocabulary.group is None:
            return TeacherRows(logprobs, ids=ids)
        ids, here = self.vocabulary.place(ids)
        return TeacherRows(logprobs, ids=ids, here=here)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of the device, for numbers of which there are few."""
    return torch.float32 if device.type == "mps" else torch.float64
