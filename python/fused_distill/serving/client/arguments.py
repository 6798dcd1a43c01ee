"""Checks of the clients' arguments. Every error is a ValueError that begins with the argument's name."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, cast

import httpx

from ...shortened import shortened
from ..protocol.urls import split_credentials, without_credentials

_LARGEST_ID = 2**31 - 1
_ESCAPES = "in a user name or password write #, /, ?, @ and [ as %23, %2F, %3F, %40 and %5B"


def whole_number(name: str, value: Any, at_least: int | None = None) -> int:
    """Return an int of Python, NumPy or PyTorch as Python's int."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {shortened(value)}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above 0 as a float."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # PyTorch's for several elements
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be a positive, finite number, got {shortened(value)}")
    return number


def elements(name: str, values: Any, of: str) -> list[Any]:
    """Return the elements of a list, of another iterable with an order, or of an array with a dimension."""
    if hasattr(values, "tolist"):  # arrays of NumPy, PyTorch and others
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, Set)):
        raise ValueError(f"{name} must be a list of {of}, got {shortened(values)}")
    return list(cast(Iterable[Any], values))


def whole_numbers(name: str, values: Any, of: str = "token ids") -> list[int]:
    """Return a list of whole numbers."""
    items = elements(name, values, of)
    if all(type(item) is int for item in items):
        return items
    return [whole_number(f"{name}[{i}]", item) for i, item in enumerate(items)]


def token_ids(name: str, values: Any) -> list[int]:
    """Return a list of token ids."""
    ids = whole_numbers(name, values)
    if ids and (min(ids) < 0 or max(ids) > _LARGEST_ID):
        index = next(i for i, token in enumerate(ids) if not 0 <= token <= _LARGEST_ID)
        raise ValueError(f"{name}[{index}] must be between 0 and {_LARGEST_ID}, got {ids[index]}")
    return ids


def server_urls(url: Any) -> list[str]:
    """Return the addresses of one or several servers, without a slash at the end."""
    urls = [url] if isinstance(url, str) else elements("url", url, "addresses")
    if not urls:
        raise ValueError("url must name at least one server, got none")
    for server in urls:
        if not isinstance(server, str) or not server.startswith(("http://", "https://")):
            shown = shortened(without_credentials(server) if isinstance(server, str) else server)
            raise ValueError(f"url must begin with http:// or https://, got {shown}")
        try:
            parts = httpx.URL(server)
            split_credentials(server)
            host = parts.host
        except (httpx.InvalidURL, ValueError) as error:
            problem = _ESCAPES if "@" in server else error  # which may quote a part of the password
            raise ValueError(f"url must be a valid address: {problem}") from None
        if parts.query or parts.fragment:
            raise ValueError(f"url must have no ? and no #; {_ESCAPES}")
        if not host or not 0 < (parts.port or 80) < 2**16 or any(map(str.isspace, server)):
            shown = parts.copy_with(username=None, password=None)
            raise ValueError(f"url must have a host, a port below 65536 and no spaces, got {str(shown)!r}")
    return [server.rstrip("/") for server in urls]


def check_token(token: Any) -> None:
    """Check that an HTTP header can hold the bearer token, which the error does not repeat."""
    if token is None:
        return
    if not isinstance(token, str) or not token:
        raise ValueError(f"token must be a string that is not empty, got {type(token).__name__}")
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ValueError(
            "token must consist of printable ASCII characters, without spaces or line breaks around it"
        )


def cache_folder(cache: Any) -> Path:
    """Return the folder of cached LM heads, which need not exist yet."""
    if cache is None:
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
    if not isinstance(cache, (str, os.PathLike)) or (Path(cache).exists() and not Path(cache).is_dir()):
        raise ValueError(f"cache must be a folder, got {shortened(cache)}")
    return Path(cache)
