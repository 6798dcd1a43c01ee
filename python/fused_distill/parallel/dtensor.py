"""Parameters that FSDP2 shards as DTensors."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import Tensor

T = TypeVar("T", bound="Tensor | None")


def gather_dtensor(parameter: T) -> T:
    """Return the full tensor of a DTensor; return anything else unchanged.

    Each rank has its own tokens, so the ranks' gradients differ. The backward pass averages them into the
    shards, as FSDP2 does for the parameters of a module's forward.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    sharded = cast(Any, parameter)
    return sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)
