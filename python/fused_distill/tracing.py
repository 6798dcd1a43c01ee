"""Keep torch.compile and torch.export out of the public functions, and refuse tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function that torch.compile must not trace: the call is a graph break."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return _disabled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with compilation disabled, which imports dynamo when first used."""
    name = getattr(function, "__qualname__", "")
    reason = f"fused_distill's {name} is not traced: use fullgraph=False, or torch.export with strict=False"
    return torch.compiler.disable(function, reason=reason)


def without_data() -> bool:
    """Return whether operations are recorded (torch.export, make_fx) or simulated (FakeTensorMode).

    Kernels and C++ would be missing in the record, and need tensors with data.
    """
    torch_c: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    keys = torch_c._TorchDispatchModeKey
    modes = (torch_c._get_dispatch_mode(key) for key in (keys.PROXY, keys.FAKE))
    return torch.compiler.is_exporting() or any(mode is not None for mode in modes)


def check_has_data(name: str, tensor: object, mask: object) -> None:
    """Require a tensor with data, and no mask whose valid tokens a record or simulation could not count."""
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise ValueError(
            f"{name} must be on a device with data, got meta; fused_distill.plan takes tensors on meta"
        )
    if mask is not None and without_data():
        raise ValueError(
            "mask must be None under torch.export, make_fx and FakeTensorMode, "
            "which cannot count valid tokens: use token_weight, or select the tokens before the call"
        )
