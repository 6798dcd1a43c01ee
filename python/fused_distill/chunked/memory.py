"""The temporary memory of a call, part by part, and the bound on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from ..config import LossConfig
from ..rows.base import RowLoss
from .autograd import Student
from .lm_head import MAX_CONVERTED_SLICE_BYTES, IndexedLMHead, LMHead, row_bytes
from .tensors import LossInputs
from .workspace import ChunkPlan, Workspace, default_workspace_bytes, plan_chunks


@dataclass(frozen=True)
class CallMemory:
    """Memory of a call besides gradients; heads have the columns of the rank that has most of them."""

    head: LMHead | IndexedLMHead  # of the student
    teacher_head: LMHead | None
    needs: dict[str, Workspace]  # by name of the part
    has_grad_buffer: bool  # the logit gradient cannot overwrite the student's logits, whose dtype differs
    bound: int  # bytes of all parts together
    constant_sizes: bool  # see `plan_chunks`

    def plan(self, n_tokens: int) -> ChunkPlan:
        """Return the chunks of n_tokens valid tokens.

        Raises:
            ValueError: the bound does not hold one token's logits.
        """
        return plan_chunks(n_tokens, self.bound, _sum(self.needs), constant_sizes=self.constant_sizes)


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of a CUDA or ROCm device's memory; None if it is another device or not present."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def call_memory(
    student: Student,
    inputs: LossInputs,
    config: LossConfig,
    row_loss: RowLoss,
    needs_grad: tuple[bool, ...],  # of hidden, weight, bias
    device_memory: int | None,
) -> CallMemory:
    """Return the memory that a call needs, equal on all ranks of a process group.

    On an accelerator, heads that must be converted are converted once, if the bound leaves as much to the
    chunks. Otherwise they are converted in slices, for each product. The default bound is larger by the
    converted heads, up to an eighth of the device's memory.
    """
    n_columns, dtype, device = inputs.shard.max_local_size, inputs.dtype, inputs.device
    head = _student_head(student, inputs, config)
    teacher_head = inputs.teacher.head(n_columns, dtype, inputs.autocast, device)
    has_grad_buffer = any(needs_grad) and head.dtype != dtype
    parts = {
        **_student_rows(head, student.hidden.shape[-1], dtype, has_grad_buffer),
        **inputs.teacher.workspaces(n_columns, dtype, device.type),
        "row arithmetic": row_loss.workspace(head.n_logits, dtype) + Workspace(per_row=512),
        "losses and statistics": Workspace(fixed=64 * _rounded_tokens(len(student.hidden), device)),
    }

    def needs(conversion_bytes: int) -> dict[str, Workspace]:
        all_parts = parts | _head_workspaces(*_converting(conversion_bytes, head, teacher_head))
        return {name: part for name, part in all_parts.items() if part != Workspace()}

    copies = sum(h.copy_bytes for h in (head, teacher_head) if isinstance(h, LMHead))
    if config.workspace_bytes is None:
        for_heads = copies if device_memory is None else min(copies, device_memory // 8)
        head_bytes = inputs.shard.max_student_size * student.weight.shape[1] * dtype.itemsize
        bound = default_workspace_bytes(device.type, head_bytes, device_memory) + for_heads
    else:
        bound = config.workspace_bytes
        for_heads = max(0, bound - _sum(needs(0)).minimum) // 2
    conversion_bytes = copies if copies <= for_heads else min(for_heads // 2, MAX_CONVERTED_SLICE_BYTES)
    heads = _converting(conversion_bytes, head, teacher_head)
    return CallMemory(*heads, needs(conversion_bytes), has_grad_buffer, bound, device.type != "cpu")


def _rounded_tokens(n_tokens: int, device: torch.device) -> int:
    """Return n_tokens, on an accelerator rounded up so that chunks do not change with it."""
    multiple = 1 if device.type == "cpu" else 1 << 16
    return -(-n_tokens // multiple) * multiple


def _student_head(student: Student, inputs: LossInputs, config: LossConfig) -> LMHead | IndexedLMHead:
    weight = student.weight[:1].expand(inputs.shard.max_student_size, -1)
    k = inputs.teacher.k
    if k is not None and config.projects_support_only:
        ids = weight.new_empty((0, k), dtype=torch.int64)
        head = IndexedLMHead
        if config.backend == "triton":
            from .indexed_triton import TritonIndexedLMHead as head
        return head(weight, inputs.dtype, inputs.device.type, ids)
    return LMHead.for_inputs(student.hidden, weight, inputs.dtype, inputs.autocast, inputs.device)


def _student_rows(
    head: LMHead | IndexedLMHead, hidden_size: int, dtype: torch.dtype, has_grad_buffer: bool
) -> dict[str, Workspace]:
    """Return the memory of a chunk's logits, their gradient, the hidden states and their gradient."""
    logits = Workspace(per_row=row_bytes(head.n_logits, dtype, head.device_type))
    hidden_bytes = 2 * hidden_size * dtype.itemsize
    if not has_grad_buffer:
        return {"student logits": logits, "student hidden states": Workspace(per_row=hidden_bytes)}
    grad = Workspace(per_grad_row=row_bytes(head.n_logits, head.dtype, head.device_type))
    return {
        "student logits": logits,
        "logit gradient": grad,
        "student hidden states": Workspace(per_grad_row=hidden_bytes),
    }


def _converting(
    n_bytes: int, head: LMHead | IndexedLMHead, teacher_head: LMHead | None
) -> tuple[LMHead | IndexedLMHead, LMHead | None]:
    """Return the heads with conversions that take at most n_bytes each, but at least a row."""
    return (
        head.converting_within(n_bytes) if isinstance(head, LMHead) else head,
        None if teacher_head is None else teacher_head.converting_within(n_bytes),
    )


def _head_workspaces(head: LMHead | IndexedLMHead, teacher_head: LMHead | None) -> dict[str, Workspace]:
    """Return the memory of converted heads, and that of the slices of others, which they share."""
    heads = {"student": head, "teacher": teacher_head}
    needs: dict[str, Workspace] = {}
    slices = Workspace()
    for name, one in heads.items():
        if isinstance(one, LMHead) and one.is_copied:
            needs[f"converted {name} head"] = one.workspace()
        elif one is not None:
            slices = slices.either(one.workspace())
    return {**needs, "slices of heads": slices}


def _sum(needs: dict[str, Workspace]) -> Workspace:
    return reduce(add, needs.values())
