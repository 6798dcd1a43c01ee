"""The help of the settings: `help_lines`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from .config import TrainConfig
from .section import Section, section_of


def help_lines(model: type[Section] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield one line of help per key."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        by_name = get_origin(field.annotation) is dict  # of a section that was listed already
        if section is not None and not by_name:
            absent = " [null]" if field.default is None else ""
            told = f"{section.__doc__ or ''} {field.description or ''}"
            yield f"{prefix}{name}{absent}: {' '.join(told.split())}"
            yield from help_lines(section, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f" [{json.dumps(field.default)}]"
        choices = " | ".join(_choices(field.annotation))
        told = f"{field.description or ''} ({choices})" if choices else field.description or ""
        yield f"{prefix}{name}{default}  {told}".rstrip()


def _choices(annotation: Any) -> list[str]:
    """Return the texts that a setting of a type may have, none if it may have any."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]
