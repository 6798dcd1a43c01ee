"""What the losses' nn.Module forms share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .validation import check_options


class LossModule(nn.Module):
    """Keeps and shows a loss's options; `allowed` is the TypedDict that lists them."""

    def __init__(self, options: Mapping[str, Any], allowed: type):
        super().__init__()
        check_options(options, allowed)
        self.options = dict(options)

    def extra_repr(self) -> str:
        """The options that were set."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
