"""Stages of row arithmetic: by torch.compile where it works, else eager, on one block of rows at a time."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ..chunked.workspace import Workspace, blocks

Stage = Callable[..., tuple[Any, ...]]  # of tensors with one entry per row in their first dimension, or None

# Logits of an eager block: on a CPU its temporaries fit the caches, elsewhere a block keeps the device busy.
_CPU_BLOCK_ELEMENTS = 1 << 20
_DEVICE_BLOCK_ELEMENTS = 1 << 25


class Compiler:
    """State of torch.compile in this process."""

    works = True  # set to False once a compilation has failed
    warned = False  # of stages that torch.compile has left uncompiled


class NotCompiledError(Exception):
    """torch.compile has run a stage eagerly, without an error."""


class NeedsEagerPlanError(Exception):
    """A stage cannot be compiled, and the chunks leave no memory for it to run eagerly."""


@dataclass(frozen=True)
class StageRunner:
    """How the stages of a row loss run, and the memory that this takes."""

    compiled: bool = False  # use torch.compile, unless it has failed before
    plans_for_eager: bool = True  # the workspace includes the temporaries of eager stages
    device_type: str = "cpu"

    def workspace(self, n_temporaries: int, n_columns: int, dtype: torch.dtype) -> Workspace:
        """Return the memory of eager stages that hold n_temporaries tensors of a block's size at once.

        If the stages are compiled, the smallest workspace is still that of eager ones. So a call that must
        fall back to them is not refused half-way.
        """
        row_bytes = n_temporaries * n_columns * dtype.itemsize
        if not self.plans_for_eager:
            return Workspace(per_uncompiled_row=row_bytes)
        elements = _CPU_BLOCK_ELEMENTS if self.device_type == "cpu" else _DEVICE_BLOCK_ELEMENTS
        return Workspace(per_block_row=row_bytes, block_rows=elements // n_columns)

    def run(
        self,
        stage: Stage,
        arguments: Callable[[slice], tuple[Any, ...]],
        n: int,
        *,
        block_rows: int | None,
    ) -> tuple[Any, ...]:
        """Run a stage on n rows.

        Args:
            stage: function of the arguments of a block of rows.
            arguments: returns the stage's arguments for a block.
            n: number of rows.
            block_rows: rows held at once when eager; None: all.

        Raises:
            NeedsEagerPlanError: the stage cannot be compiled, as was planned.
        """
        if self.compiled and Compiler.works:
            try:
                return compiled_stage(stage)(*arguments(slice(0, n)))
            except Exception as error:  # of many types, without a working compiler; nothing is written yet
                if _is_out_of_memory(error):
                    raise
                _warn_of_eager_stages(error)
        if not self.plans_for_eager:
            raise NeedsEagerPlanError
        parts = [stage(*arguments(block)) for block in blocks(n, block_rows or max(n, 1))]
        if len(parts) == 1:
            return parts[0]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


EAGER = StageRunner()


@cache
def compiled_stage(stage: Stage) -> Stage:
    """Return the stage, compiled once for all shapes, but for each variant of its arguments on its own.

    torch.compile stops compiling a function that has been compiled for eight variants. So each variant has
    a function of its own. One that has worked before and fails is compiled afresh: it may have reached that
    limit by changes of torch's global settings.

    The function raises NotCompiledError if torch.compile runs a stage eagerly without an error.
    """
    variants: dict[tuple[Any, ...], Stage] = {}

    def run(*arguments: Any) -> tuple[Any, ...]:
        variant = _variant(arguments, [])
        known = variants.pop(variant, None)
        result: tuple[Any, ...] | None = None
        if known is not None:
            try:
                result = known(*arguments)
            except Exception as error:
                if _is_out_of_memory(error):
                    raise
                known = None
        if known is None or result is None:
            known = _compile(stage)
            result = known(*arguments)
        variants[variant] = known  # not reached after an error: the next call compiles the variant again
        return result

    return run


def _compile(stage: Stage) -> Stage:
    """Return the stage as a new function for torch.compile, which raises if it is not compiled."""

    def checked(*arguments: Any) -> tuple[Any, ...]:
        if not torch.compiler.is_dynamo_compiling():  # the compiler takes this for True
            raise NotCompiledError
        return stage(*arguments)

    # torch.compile counts by code object.
    code = checked.__code__.replace()
    function = types.FunctionType(code, checked.__globals__, checked.__name__, None, checked.__closure__)
    return torch.compile(function, dynamic=True, fullgraph=True)


def _variant(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """Return what the compiler specializes on: dtypes, sizes and strides of 0 and 1, aliases, constants."""
    variant: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            alias = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
            layout = (*(min(size, 2) for size in value.shape), *(min(step, 2) for step in value.stride()))
            variant.append((alias, value.dtype, value.device, layout))
            tensors.append(value)
        elif isinstance(value, tuple):
            variant.append(_variant(cast("tuple[Any, ...]", value), tensors))
        else:
            variant.append(value)
    return tuple(variant)


def _warn_of_eager_stages(error: Exception) -> None:
    """Warn once that stages run eagerly, and remember a compiler that does not work."""
    if isinstance(error, NotCompiledError):
        if Compiler.warned:
            return
        Compiler.warned = True
        cause = (
            "torch.compile is disabled for this call (by TORCHDYNAMO_DISABLE, torch.compiler.set_stance or "
            "an active TorchDispatchMode), falling back to eager mode, which is several times slower"
        )
    else:
        Compiler.works = False
        first_line = str(error).split("\n", 1)[0]
        cause = (
            f"torch.compile failed ({type(error).__name__}: {first_line}), falling back to eager mode, which "
            "is several times slower. If no C++ compiler is installed, install one"
        )
    warnings.warn(f"fused_distill: {cause}", RuntimeWarning, stacklevel=3)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if memory ran out, also where the compiler's error wraps the cause."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False
