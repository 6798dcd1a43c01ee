"""The tensor arguments of a loss, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LossConfig
from ..parallel.vocab_shard import VocabShard
from ..rows.cpp.library import why_unavailable
from ..stats import DistillStats, WeightFunction
from ..validation import (
    check_float,
    check_hidden_and_head,
    check_labels,
    check_normalizer,
    check_reverse_weight,
    check_token_data,
    check_tokens,
)
from .autograd import Student
from .teacher import Teacher
from .workspace import shard_of_call


class LossTensors(NamedTuple):
    """The tensors of a loss in the caller's shapes, and the normalizer."""

    student_hidden: Tensor  # (..., Ds)
    student_weight: Tensor  # (Vs, Ds)
    student_bias: Tensor | None  # (Vs,)
    teacher: Teacher
    mask: Tensor | None  # (...) bool
    token_weight: Tensor | WeightFunction | None  # (...)
    token_data: Mapping[str, Tensor] | None  # (...) each
    labels: Tensor | None  # (...)
    reverse_weight: float | Tensor  # or (...)
    normalizer: float | Tensor | None

    def check(self, config: LossConfig) -> VocabShard:
        """Check every tensor, and return this rank's shard of the vocabulary."""
        hidden = check_float("student_hidden", self.student_hidden)
        device, shape = hidden.device, hidden.shape[:-1]
        check_hidden_and_head("student_", hidden, self.student_weight, self.student_bias, device)
        check_tokens(shape, device, self.mask, self.token_weight)
        check_reverse_weight(self.reverse_weight, config.divergence, shape, device, self.mask)
        check_token_data(self.token_data, self.token_weight, shape, device)
        check_normalizer(self.normalizer, config.reduction, self.mask, shape.numel())
        self.teacher.check(hidden)
        student = {name: getattr(self, name) for name in self._fields[:3]}
        wants_cpp = device.type == "cpu" and config.backend in ("auto", "cpp")
        uses_cpp = wants_cpp and why_unavailable() is None
        shard = shard_of_call(config, student, self.teacher.products, self.mask, uses_cpp=uses_cpp)
        if config.surplus == "count":
            shard = replace(shard, n_surplus=len(self.student_weight) - shard.total)
        check_labels(self.labels, config.hard_weight, shape, device, shard.total, self.mask)
        return shard


@dataclass(frozen=True)
class LossInputs:
    """The constants of a loss; tokens are flattened."""

    teacher: Teacher
    shard: VocabShard
    device: torch.device  # where the loss is computed
    dtype: torch.dtype  # of logits, losses and accumulated gradients
    autocast: torch.dtype | None  # dtype of the products under autocast
    token_weight: Tensor | None  # (N,)
    weight_function: WeightFunction | None
    token_data: dict[str, Tensor]  # (N,) each, arguments of weight_function
    labels: Tensor | None  # (N,) int64
    reverse_weight: Tensor | None  # (N,), None unless the divergence is "mixed_kl"
    valid_token_ids: Tensor | None  # (n,) int64 positions of the tokens that count; None: all tokens

    def weigh(self, stats: DistillStats, tokens: slice | Tensor) -> Tensor:
        """Return the weights that weight_function gives for the n tokens of a chunk, (n,) in dtype.

        Raises:
            ValueError, TypeError: the result has another shape, or is no tensor.
        """
        assert self.weight_function is not None
        n = stats.forward_kl.shape
        if not n.numel():
            return stats.forward_kl.to(self.dtype)
        weight = self.weight_function(stats, **{k: v[tokens] for k, v in self.token_data.items()})
        if not isinstance(weight, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"token_weight must return a torch.Tensor, got {type(weight).__name__}")
        if weight.shape != n:
            expected = f"one weight per token of its statistics, shape {tuple(n)}"
            raise ValueError(f"token_weight must return {expected}, got {tuple(weight.shape)}")
        return weight.to(self.dtype)

    @property
    def constants(self) -> dict[str, Tensor | None]:
        """Return the caller's tensors that receive no gradient, by argument name."""
        own = {name: getattr(self, name) for name in ("token_weight", "labels", "reverse_weight")}
        data = {f"token_data[{name!r}]": tensor for name, tensor in self.token_data.items()}
        return {**self.teacher.tensors, **own, **data}

    def n_valid(self, student: Student) -> int:
        """Return the number of tokens that count."""
        return len(student.hidden) if self.valid_token_ids is None else len(self.valid_token_ids)
