"""Rows of data files: JSON Lines, JSON, CSV or Parquet, also gzipped, or of a dataset on the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset

from ..shortened import shortened
from .config import ConfigError, DataConfig

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, and the files that they were read from in this order."""

    table: Dataset
    source: str
    files: list[str]  # empty: the rows were read by the name of a dataset

    def locate(self, row: int) -> str:
        """Return the file and the row in it, counted from 0, of a row of the table."""
        for file in self.files:
            length = len(self.table) if len(self.files) == 1 else len(_load(file, [file]))
            if row < length:
                return f"{file}: row {row}"
            row -= length
        return f"{self.source}: row {row}"


def read_rows(config: DataConfig) -> Rows:
    """Read the rows of `data.path`: files, patterns such as `chats-*.jsonl.gz`, a folder or a hub name.

    Raises:
        ConfigError: there is no such file, or a file cannot be read (the message names file and line).
    """
    paths = [config.path] if isinstance(config.path, str) else config.path
    found = [_find_files(path) for path in paths]
    if None in found:
        if isinstance(config.path, str):
            return _read_dataset(config.path, config)
        raise ConfigError(f"data.path: a list must hold files, got {paths[found.index(None)]}")
    source = ", ".join(paths)
    if (config.name, config.split) != (None, "train"):
        key = "split" if config.name is None else "name"
        raise ConfigError(
            f"data.{key}: {getattr(config, key)} is of a dataset, but data.path {source} is a file"
        )
    files = [file for part in found for file in part or ()]
    return Rows(_load(source, files), source, files)


def _find_files(path: str) -> list[str] | None:
    """Return the file of a path or the files of a pattern, None if it names a dataset.

    Raises:
        ConfigError: there is no such file, or it has none of the formats.
    """
    if glob.has_magic(path) and not Path(path).exists():
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise ConfigError(f"data.path: no file matches {path}")
        return files
    if _format(path) is not None:
        if not Path(path).is_file():
            raise ConfigError(f"data.path: there is no file {path}")
        return [path]
    if Path(path).is_file():
        raise ConfigError(
            f"data.path: {path} must end with one of {', '.join(FORMATS)}, or with .gz after it"
        )
    return None


def _read_dataset(path: str, config: DataConfig) -> Rows:
    try:
        return Rows(load_dataset(path, config.name, split=config.split), f"{path} ({config.split})", [])
    except Exception as error:  # the readers of datasets raise many types
        raise ConfigError(f"data.path: {path} cannot be read: {_first_line(error)}") from error


def _format(path: str) -> str | None:
    return FORMATS.get(Path(path.lower().removesuffix(".gz")).suffix)


def _load(source: str, files: list[str]) -> Dataset:
    formats = {_format(file) for file in files}
    if None in formats or len(formats) > 1:
        raise ConfigError(
            f"data.path: the files of {source} must all have one of the formats {', '.join(FORMATS)}"
        )
    kind = str(formats.pop())
    names = [glob.escape(file) for file in files]  # datasets takes them for patterns
    try:
        options = _csv_options(files[0]) if kind == "csv" else {}
        return load_dataset(kind, data_files=names, split="train", **options)
    except Exception as error:  # the readers of datasets raise many types
        raise unreadable(source, files, error.__cause__ or error) from error


def _open(file: str, mode: str, **options: Any) -> Any:
    """Open a file that may be gzipped."""
    return (gzip.open if file.lower().endswith(".gz") else open)(file, mode, **options)


def _csv_options(file: str) -> dict[str, Any]:
    """Return options of datasets by which every cell of a CSV file is text, and null if it is empty."""
    with _open(file, "rt", encoding="utf-8-sig", newline="") as stream:
        columns = next(csv.reader(stream), [])
    features = Features({name: Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def unreadable(source: str, files: list[str], error: BaseException) -> ConfigError:
    """Return an error that names the place in the files that cannot be read, if one is found."""
    problem = next(filter(None, map(_find_problem, files)), None)
    if problem is None and len(files) > 1 and not isinstance(error, OSError):
        told = _find_difference(files) or f"{source}: {_first_line(error)}"
        problem = f"all files must have the same columns and types: {told}"
    return ConfigError(f"data.path: {problem or f'{source} cannot be read: {_first_line(error)}'}")


def _find_difference(files: list[str]) -> str | None:
    """Return which files of one format differ in a column, None if none does."""
    first, *others = ((file, _load(file, [file]).features) for file in files)
    absent: list[str] = []  # which some formats allow
    for file, features in others:
        for column in {**first[1], **features}:
            kinds = [_type_of(column, known) for known in (features, first[1])]
            told = f"column {column} is {kinds[0]} in {file}, but {kinds[1]} in {first[0]}"
            if "absent" in kinds:
                absent.append(told)
            elif kinds[0] != kinds[1] and "null" not in kinds:  # which fits any type
                return told
    return next(iter(absent), None)


def _type_of(column: str, features: Features) -> str:
    return getattr(features[column], "dtype", "of lists or objects") if column in features else "absent"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _find_problem(file: str) -> str | None:
    """Return what is wrong in a file that could not be read, None if nothing was found."""
    try:
        with _open(file, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError) as error:
        return f"{file} cannot be read: {_first_line(error)}"
    if not content.strip():
        return f"{file} is empty"
    if _format(file) != "json":
        return None
    types: dict[str, tuple[str, int]] = {}
    try:
        for number, row in _json_rows(content):
            if not isinstance(row, dict):
                return f"{file}: line {number} must be an object of columns, got {shortened(row)}"
            for column, value in row.items():
                kind, first = types.setdefault(column, (_kind(value), number))
                if kind != _kind(value) and value is not None:
                    if kind == "null":
                        types[column] = (_kind(value), number)
                        continue
                    told = f"{shortened(value)} is {_kind(value)}, but line {first} has {kind}"
                    return f"{file}: line {number}, column {column}: {told}"
    except UnicodeDecodeError as error:
        return f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
    except _LineError as error:
        return f"{file}: {error}"
    return None


class _LineError(ValueError):
    """A line is no JSON; the message names and quotes it."""


def _json_rows(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the line and the value of each row of a JSON array or of JSON lines."""
    text = content.decode()
    lines = text.split("\n")  # JSON texts may contain other ends of lines
    whole = text.lstrip().startswith("[")
    for number, line in [(1, text)] if whole else enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            number += error.lineno - 1
            raise _LineError(
                f"line {number} is no JSON ({error.msg}): {shortened(lines[number - 1])}"
            ) from error
        yield from ((number, row) for row in value) if whole else [(number, value)]


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
