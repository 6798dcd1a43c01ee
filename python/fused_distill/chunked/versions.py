"""Changes in place, between forward and backward, of tensors that a backward pass reads again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class InputVersions:
    """The constants of a loss and their versions, which torch increments with each change in place.

    autograd checks versions in the same way, but saves no inference tensors. These have no version, and
    changes of them are not noticed.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:  # by argument name
        self._saved = {
            name: (tensor, tensor._version)
            for name, tensor in tensors.items()
            if tensor is not None and not tensor.is_inference()
        }

    def check(self) -> None:
        """Raise a RuntimeError that names a tensor which has changed."""
        for name, (tensor, version) in self._saved.items():
            if tensor._version != version:
                raise RuntimeError(
                    f"{name}, which this backward pass reads again, has been modified by an inplace "
                    f"operation since the forward pass: {list(tensor.shape)} is at version "
                    f"{tensor._version}; expected version {version} instead. Pass a clone, or change {name} "
                    "after the last backward pass"
                )
