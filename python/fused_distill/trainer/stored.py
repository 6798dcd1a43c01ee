"""Read a teacher's stored top-k log-probabilities of a dataset's completions; `cache_teacher` writes them.

The folder holds part-*.parquet, and teacher.json with the settings of the store and fingerprints of data,
tokenizer and teacher. A row is a completion:

    tokens         list<int32>              the teacher's prompt followed by the completion
    prompt_length  int32
    ids            list<list<int32>>        the teacher's k most likely tokens at each completion token
    logprobs       list<list<float>>        their log-probabilities, float32 or float16
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from .config import ConfigError, TeacherConfig
from .data import Batch, Data, Sample
from .targets import Kind, TopKTargets

DESCRIPTION = "teacher.json"
KEYS = ("data", "tokenizer", "teacher", "source", "k", "temperature", "vocab_size", "dtype", "rows")
PART_ROWS = 256


class StoredTeacher:
    """Targets at k tokens per position from a store, whose numbers stay in memory-mapped files."""

    def __init__(self, folder: Path, settings: TeacherConfig, temperature: float, vocab_size: int):
        self.folder, self.info = folder, read_description(folder)
        k, stored_k, stored_temperature = settings.k, self.info["k"], self.info["temperature"]
        if k > stored_k or temperature != stored_temperature:
            stored = f"k {stored_k} at temperature {stored_temperature}"
            raise ConfigError(f"teacher.stored: it holds {stored}, not k {k} at {temperature}")
        parts = list_parts(folder, self.info["rows"])
        for part, rows in parts.items():
            if not is_whole(part, rows):
                state = "cut off" if part.exists() else "missing"
                advice = f"run cache-teacher again ({part.name} is {state})"
                raise ConfigError(f"teacher.stored: {folder} is not complete: {advice}")
        self.settings, self.fingerprint = settings, self.info["teacher"]
        self.vocab_size = min(vocab_size, self.info["vocab_size"])
        self.kind: Kind = "topk"
        try:
            files: Any = [*map(str, parts)]
            self._columns: Any = Dataset.from_parquet(files).data
        except Exception as error:  # the readers of datasets raise many types
            raise ConfigError(
                f"teacher.stored: {folder} cannot be read: {error.__cause__ or error}"
            ) from error
        tokens, lengths = (self._columns.column(name) for name in ("tokens", "prompt_length"))
        self._rows = {
            _hash(row.values.to_numpy(), length.as_py()): i
            for i, (row, length) in enumerate(zip(tokens, lengths, strict=True))
        }

    def check(self, data: Data, name: str, fingerprint: str | None) -> None:
        """Raise a ConfigError if a sample of the teacher with this name is not in the store.

        Data with the fingerprint of the store's is the same data.
        """
        if fingerprint == self.info["data"]:
            return
        drawn = (Sample(**data.samples[i]) for i in range(len(data.samples)))
        samples = [(sample.row, _key(sample.for_teacher())) for sample in drawn if sample.teacher == name]
        absent = [row for row, key in samples if key not in self._rows]
        if absent:
            raise ConfigError(
                f"teacher.stored: {self.folder} was made from other data, or with other settings of data and "
                f"rollouts.max_completion_length: it lacks the completions of {len(absent)} of "
                f"{len(samples)} samples of {data.source}, the first in row {absent[0]}"
            )

    def targets(self, batch: Batch, student_ids: Tensor | None) -> TopKTargets:
        """See Teacher; student_ids must be None."""
        rows = [self._rows[_key(sample)] for sample in batch.samples]
        stored = [np.concatenate([self._matrix(name, row) for row in rows]) for name in ("logprobs", "ids")]
        logprobs, ids = (torch.from_numpy(numbers).to(batch.valid.device) for numbers in stored)
        # Tokens without a row in the student's LM head belong to the tail.
        return TopKTargets(logprobs.float().masked_fill(ids >= self.vocab_size, -torch.inf), ids)

    def _matrix(self, column: str, row: int) -> NDArray[Any]:
        """Return the (positions, k) values of a row."""
        positions = self._columns.column(column)[row].values
        return positions.flatten().to_numpy().reshape(len(positions), self.info["k"])[:, : self.settings.k]


def read_description(folder: Path) -> dict[str, Any]:
    """Return the settings and the fingerprints of a store.

    Raises:
        ConfigError: the folder holds none, or one that cannot be read.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise ConfigError(f"teacher.stored: {folder} holds no {DESCRIPTION}")
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        lacking = [key for key in KEYS if key not in info]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher.stored: {path} cannot be read: {error}") from error
    if lacking:
        raise ConfigError(f"teacher.stored: {path} has no {', '.join(lacking)}: write a new store")
    return info


def list_parts(folder: Path, rows: int) -> dict[Path, range]:
    """Return the files of a complete store with the rows in each."""
    parts = [range(start, min(start + PART_ROWS, rows)) for start in range(0, rows, PART_ROWS)]
    return {folder / f"part-{i:06}.parquet": part for i, part in enumerate(parts)}


def is_whole(part: Path, rows: range) -> bool:
    """Return whether a file has the rows. A file that was cut off has no footer, so it has none."""
    try:
        return pq.read_metadata(part).num_rows == len(rows)
    except (OSError, pa.ArrowException):
        return False


def _key(sample: Sample) -> bytes:
    return _hash(np.array(sample.tokens, np.int32), len(sample.prompt))


def _hash(tokens: NDArray[np.int32], prompt_length: int) -> bytes:
    return hashlib.sha256(np.int32(prompt_length).tobytes() + tokens.tobytes()).digest()
