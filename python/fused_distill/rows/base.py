"""Interface of the row losses, the arithmetic on a chunk of logits, where backends differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..chunked.workspace import Workspace
from ..config import LossConfig
from ..parallel.vocab_shard import ShardGroup
from ..stats import DistillStats, RowResult

# The teacher's smallest probability of a tail or of surplus rows. Below float32 resolution; it keeps reverse
# KL finite (the same clamp as TRL's).
MIN_TEACHER_TAIL_PROB = 1e-7


class StudentRows(NamedTuple):
    """The student's side of a chunk of n tokens."""

    logits: Tensor  # (n, V) float32 / float64, as projected, or with surplus rows (n, Vs); may be overwritten
    weight: Tensor  # (n,) in the same dtype, contiguous: the factor of each row's loss
    bias: Tensor | None = None  # (V,)
    labels: Tensor | None = None  # (n,) int64; -100: no label; V or more: a column of another rank
    scaled_weight: Tensor | None = None  # (n,) like weight: weight times a factor that the loop undoes
    reverse_weight: Tensor | None = None  # (n,) like weight, given for divergence="mixed_kl"
    weigh: Callable[[DistillStats], Tensor] | None = None  # returns (n,) like weight, another factor

    @property
    def grad_weight(self) -> Tensor:
        """Return the (n,) factor of each row's logit gradient."""
        return self.weight if self.scaled_weight is None else self.scaled_weight

    def weighted(self, stats: DistillStats | None) -> StudentRows:
        """Return the rows with the factors that `weigh` gives for their statistics, if there is one."""
        if self.weigh is None or stats is None:
            return self
        factor = self.weigh(stats)
        scaled = None if self.scaled_weight is None else self.scaled_weight * factor
        return self._replace(weight=self.weight * factor, scaled_weight=scaled, weigh=None)

    def split(self, n_columns: int) -> tuple[StudentRows, StudentRows]:
        """Return the rows' first n_columns columns, and the surplus ones."""

        def part(columns: slice) -> StudentRows:
            bias = None if self.bias is None else self.bias[columns]
            return self._replace(logits=self.logits[:, columns], bias=bias)

        return part(slice(n_columns)), part(slice(n_columns, None))


class TeacherRows(NamedTuple):
    """The teacher's side of a chunk of n tokens: logits, or log-probabilities at K ids."""

    # (n, V) logits, as projected, which may be overwritten; with ids (n, K) log-probabilities, -inf if absent
    values: Tensor
    bias: Tensor | None = None  # (V,) of the logits
    # (n, K) int64 columns. An absent entry repeats an id of its row; for the Triton kernels it is -1, and so
    # is a column of another rank.
    ids: Tensor | None = None
    is_local: Tensor | None = None  # (n, K) bool: False for a column of another rank; None: all are local


class RowLoss(Protocol):
    """Losses and logit gradients of a chunk of rows, and the temporary memory that they need."""

    def workspace(self, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the temporary memory for n_columns student logits per row."""
        ...

    def __call__(
        self,
        student: StudentRows,
        teacher: TeacherRows,
        config: LossConfig,
        *,
        grad: Tensor | None,  # (n, V), may be student.logits: receives grad_weight * d(loss) / d(logits)
        group: ShardGroup,
        block_rows: int | None,  # rows whose temporaries may be held at once; None: all
    ) -> RowResult:
        """Return the losses of n rows, and with config.return_stats their statistics."""
        ...


class TailStatistics(NamedTuple):
    """Log-sum-exp parts of the tail's columns, (n,) each, in float64 where the device has it."""

    max_z: Tensor  # of the logits over temperature; -inf where the tail is empty
    sum_z: Tensor  # sum of e^(z - max_z)
    max_y: Tensor  # of the logits at temperature 1
    sum_y: Tensor
