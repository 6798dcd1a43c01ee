"""Reading a JSON body in pieces, so that a large one does not keep other threads from running."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import FailFast, Field, GetPydanticSchema, ValidationInfo
from pydantic_core import core_schema

WHOLE_BYTES = 1 << 20  # a body up to this size is parsed at once, which takes a few milliseconds
_REST_BYTES = 16 << 20  # of a larger body without its lists of token ids, which is parsed at once

_ID_LIST = re.compile(rb"\[\s*\d[\d,\s]*\]")  # innermost lists of nonnegative integers
_decode_ids = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]).decode

IdList = NDArray[np.int32]


class TakenLists(NamedTuple):
    """Lists of token ids that were taken out of a body, and their numbers there: first, first - 1, ..."""

    # Drawn for each body, so that no client can refer to a list. No valid field is a negative fraction.
    first: float
    lists: list[IdList]


class FirstError(FailFast):
    """Stop at the first invalid element; a body with millions of them must not produce as many messages."""

    def __hash__(self) -> int:  # unions of annotated types need it
        return id(self)


def take_id_lists(body: bytes, max_lists: int, max_ids: int) -> tuple[bytes, TakenLists]:
    """Replace the lists of token ids of a large body by numbers, under which `Ids` and `Counts` find them.

    What is no valid list of token ids stays in the body, whose validation then reports it.

    Args:
        body: JSON of any content.
        max_lists: number of lists that a valid body may have.
        max_ids: number of ids that a list may have.

    Returns:
        The body and the lists, which are validated as `model_validate_json(body, context=taken)`.

    Raises:
        ValueError: the body has too many or too long lists, or is too large without them.
    """
    taken = TakenLists(-(10**9) - secrets.randbelow(10**9) - 0.5, [])
    if len(body) <= WHOLE_BYTES:
        return body, taken
    n_lists = body.count(b"[")
    if n_lists > max_lists:
        raise ValueError(f"body must have at most {max_lists} lists, got {n_lists}")

    def take(match: re.Match[bytes]) -> bytes:
        text = match.group()
        n_ids = text.count(b",") + 1
        if n_ids > max_ids:
            raise ValueError(f"body must have at most {max_ids} ids in a list, got {n_ids}")
        try:
            taken.lists.append(np.array(_decode_ids(text), dtype=np.int32))
        except msgspec.DecodeError:
            return text
        return b"%.1f" % (taken.first - len(taken.lists) + 1)

    rest = _ID_LIST.sub(take, body)
    if len(rest) > _REST_BYTES:
        raise ValueError(f"body must have at most {_REST_BYTES} bytes besides its lists of token ids")
    return rest, taken


def _taken(value: Any, info: ValidationInfo) -> IdList | None:
    taken: TakenLists | None = info.context
    if taken is None or type(value) is not float:
        return None
    index = taken.first - value
    return taken.lists[int(index)] if index.is_integer() and 0 <= index < len(taken.lists) else None


def _as_ids(value: Any, handler: Callable[[Any], list[int]], info: ValidationInfo) -> IdList:
    ids = _taken(value, info)
    return np.array(handler(value), dtype=np.int32) if ids is None else ids


def _as_counts(value: Any, handler: Callable[[Any], list[int]], info: ValidationInfo) -> list[int]:
    counts = _taken(value, info)
    return handler(value) if counts is None else counts.tolist()


def _wrapped(items: Any, function: Any) -> GetPydanticSchema:
    return GetPydanticSchema(
        lambda _, handler: core_schema.with_info_wrap_validator_function(function, handler(items))
    )


# A list of token ids, as an (n,) array.
Ids = Annotated[
    IdList, _wrapped(Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], FirstError()], _as_ids)
]
# A list of integers of any size.
Counts = Annotated[list[int], _wrapped(Annotated[list[int], FirstError()], _as_counts)]
