"""What all sections of the settings share: which values are refused, and how an error shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, cast, get_args

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
        if isinstance(value, bool) and annotation is not bool:
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        if value == "" and (annotation is Path or Path in get_args(annotation)):
            raise PydanticCustomError("path", "Input should be a path")
        return value

    @field_serializer("url", check_fields=False)
    def _hide_credentials(self, url: list[str] | str | None) -> list[str] | str | None:
        """Keep passwords out of reports and trackers, which get the settings of a run."""
        if url is None or isinstance(url, str):
            return url and without_credentials(url)
        return [without_credentials(server) for server in url]


def problem(error: ErrorDetails) -> str:
    """Return a setting's dotted key, what is wrong with it, and what was given, without passwords."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]") or "config"
    text = f"{key}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] in ("missing", "value_error"):  # of a section's keys together, which the message names
        return text
    return f"{text}, got {re.sub('//[^/@]*@', '//', shortened(error['input']))}"
