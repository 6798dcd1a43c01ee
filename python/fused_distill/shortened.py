"""Values in error messages."""

from __future__ import annotations

from reprlib import Repr

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shortened(value: object) -> str:
    """Quote a value in at most 80 characters, without building the text of a huge one."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
