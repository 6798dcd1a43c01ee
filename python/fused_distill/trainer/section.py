"""What all sections of the settings share: which values are refused, and how an error shows them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_serializer, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from ..serving.protocol.urls import without_credentials
from ..shortened import shortened


def _check_texts(value: Any) -> Any:
    """Give a single error for a union, where pydantic gives one per member."""
    texts = cast(list[Any], value) if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError("texts", "Input should be a text or a list of texts, none of them empty")
    return value


Texts = Annotated[list[str] | str, BeforeValidator(_check_texts)]


class Section(BaseModel):
    """A section of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_converted(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert without a word: true to 1, and an empty path to this folder."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and section_of(annotation) is None:
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        if value == "" and (annotation is Path or Path in get_args(annotation)):
            raise PydanticCustomError("path", "Input should be a path")
        return value

    @field_validator("student", "output", "path", "model", "stored", "tokenizer", check_fields=False)
    @classmethod
    def _expand_home(cls, value: list[str] | str | Path | None) -> list[str] | str | Path | None:
        """Replace ~ at the start of a path by the home folder; names on the hub stay as they are."""
        if isinstance(value, list):
            return [os.path.expanduser(path) for path in value]
        return None if value is None else type(value)(os.path.expanduser(value))

    @field_validator("url", check_fields=False)
    @classmethod
    def _check_scheme(cls, value: list[str] | str | None) -> list[str] | str | None:
        urls = [value] if isinstance(value, str) else value or []
        if not all(url.lower().startswith(("http://", "https://")) for url in urls):
            raise PydanticCustomError("url", "must begin with http:// or https://")
        return value

    @field_serializer("url", check_fields=False)
    def _hide_credentials(self, url: list[str] | str | None) -> list[str] | str | None:
        """Keep passwords out of reports and trackers, which get the settings of a run."""
        if url is None or isinstance(url, str):
            return url and without_credentials(url)
        return [without_credentials(server) for server in url]


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a setting of a type is, or holds by name; None if it is none."""
    kinds = (annotation, *get_args(annotation))
    return next(
        (k for k in kinds if get_origin(k) is None and isinstance(k, type) and issubclass(k, Section)), None
    )


def problem(error: ErrorDetails, settings: type[Section]) -> str:
    """Return a setting's dotted key, what is wrong with it, and what was given, without passwords."""
    keys = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(keys) or "config"
    if error["type"] == "extra_forbidden":
        return f"{key} is no setting; {_advice(settings, keys)}"
    given = error["input"]
    first = next(iter(_section_at(settings, keys).model_fields))
    told = {
        "model_type": f"must have settings of its own, e.g. {{{first}: ...}}",
        "dict_type": "must be a mapping, e.g. {name: ...}",
        "list_type": f"must be a list, e.g. [{given if isinstance(given, str) else '...'}]",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] in ("missing", "value_error"):  # of a section's keys together, which the message names
        return f"{key}: {told}"
    quoted = shortened(given)
    if keys[-1:] == ["url"]:  # without passwords
        quoted = re.sub(r"[^\s/'\"@]*@", "", quoted)
    return f"{key}: {told}, got {quoted}"


def _advice(settings: type[Section], keys: Sequence[str]) -> str:
    """Return which setting may be meant by an unknown one, or else which there are."""
    *path, name = keys
    section = _section_at(settings, path)
    elsewhere = [known for known in _known_keys(settings) if known.split(".")[-1] == name]
    near = [".".join([*path, known]) for known in get_close_matches(name, section.model_fields, n=1)]
    if meant := elsewhere or near:
        return f"did you mean {' or '.join(meant)}?"
    if not path:
        return "fused-distill train --help lists all of them"
    return f"{'.'.join(path)} has {', '.join(section.model_fields)}"


def _section_at(settings: type[Section], keys: Sequence[str]) -> type[Section]:
    """Return the section with the given keys, among which there may be the name of a teacher."""
    for key in keys:
        field = settings.model_fields.get(key)
        settings = (field and section_of(field.annotation)) or settings
    return settings


def _known_keys(settings: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all settings, without those of a section by name."""
    for name, field in settings.model_fields.items():
        yield f"{prefix}{name}"
        section = section_of(field.annotation)
        if section is not None and get_origin(field.annotation) is not dict:
            yield from _known_keys(section, f"{prefix}{name}.")
