"""Parameters that FSDP2 keeps in shards."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import Tensor

T = TypeVar("T", bound="Tensor | None")


def whole(parameter: T) -> T:
    """A DTensor gathered into an ordinary tensor; anything else as it is.

    Ranks have tokens of their own, so that their gradients differ: the way back averages them into the
    shards, as FSDP2 does for what a module's forward uses. Where ranks have the same tokens the average
    changes nothing.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    sharded = cast(Any, parameter)
    return sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)
