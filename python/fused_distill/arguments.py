"""Arguments of the public losses: their keywords for type checkers, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .chunked.teacher import FullTeacher, TopKTeacher
from .chunked.tensors import LossTensors
from .config import Backend, Divergence, Reduction, Surplus, Tail
from .stats import WeightFunction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tensors_from(teacher: type[FullTeacher | TopKTeacher], arguments: Mapping[str, Any]) -> LossTensors:
    """Collect the tensors and the normalizer among the `locals()` of a public function."""
    names = {f.name: f"teacher_{f.name}" for f in fields(teacher)}
    of_teacher = {field: arguments[name] for field, name in names.items() if name in arguments}
    others = {name: arguments[name] for name in LossTensors._fields if name != "teacher"}
    return LossTensors(teacher=teacher(**of_teacher), **others)


class _Keywords(TypedDict, total=False):
    """Options that the losses share, except return_stats, on which the type of the result depends."""

    mask: Tensor | None
    student_bias: Tensor | None
    divergence: Divergence
    beta: float
    alpha: float
    reverse_weight: float | Tensor
    entry_clip: float | None
    temperature: float
    student_logit_scale: float
    student_softcap: float | None
    token_weight: Tensor | WeightFunction | None
    token_data: Mapping[str, Tensor] | None
    labels: Tensor | None
    hard_weight: float
    soft_weight: float
    vocab_size: int | None
    surplus: Surplus
    reduction: Reduction
    normalizer: float | Tensor | None
    workspace_bytes: int | None
    backend: Backend
    process_group: ProcessGroup | None


class JSDKeywords(_Keywords, total=False):
    """Keywords of `fused_linear_jsd` besides return_stats."""

    teacher_bias: Tensor | None
    teacher_logit_scale: float
    teacher_softcap: float | None


class TopKJSDKeywords(_Keywords, total=False):
    """Keywords of `fused_linear_topk_jsd` besides return_stats."""

    tail: Tail
