"""Read a teacher's stored top-k log-probabilities of a dataset's completions; `cache_teacher` writes them.

The folder holds teacher.json, with the settings of the store, and part-*.parquet. A row is a completion:

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
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from .config import ConfigError, TeacherConfig
from .data import Batch
from .targets import TopKTargets

DESCRIPTION = "teacher.json"
PART_ROWS = 256


class StoredTeacher:
    """Targets at k tokens per position from a store, whose numbers stay in memory-mapped files."""

    def __init__(self, folder: Path, settings: TeacherConfig, temperature: float, vocab_size: int):
        description, k = folder / DESCRIPTION, settings.k
        if not description.exists():
            raise ConfigError(f"teacher.stored: {folder} holds no {DESCRIPTION}")
        self.info: dict[str, Any] = json.loads(description.read_text())
        stored_k, stored_temperature = self.info["k"], self.info["temperature"]
        if k > stored_k or temperature != stored_temperature:
            stored = f"k {stored_k} at temperature {stored_temperature}"
            raise ConfigError(f"teacher.stored: it holds {stored}, not k {k} at {temperature}")
        parts: Any = sorted(map(str, folder.glob("part-*.parquet")))
        if len(parts) != -(-self.info["rows"] // PART_ROWS):
            raise ConfigError(f"teacher.stored: {folder} is not complete: run cache-teacher again")
        self.settings, self.vocab_size = settings, vocab_size
        self._columns: Any = Dataset.from_parquet(parts).data
        tokens, lengths = (self._columns.column(name) for name in ("tokens", "prompt_length"))
        self._rows = {
            _hash(row.values.to_numpy(), length.as_py()): i
            for i, (row, length) in enumerate(zip(tokens, lengths, strict=True))
        }

    def targets(self, batch: Batch, student_ids: Tensor | None) -> TopKTargets:
        """See Teacher; student_ids must be None."""
        rows: list[int] = []
        for sample in batch.samples:
            key = _hash(np.array(sample.tokens, np.int32), len(sample.prompt))
            if key not in self._rows:
                raise ConfigError(f"teacher.stored: it has no completion {sample.completion[:8]}...")
            rows.append(self._rows[key])
        stored = [np.concatenate([self._matrix(name, row) for row in rows]) for name in ("logprobs", "ids")]
        logprobs, ids = (torch.from_numpy(numbers).to(batch.valid.device) for numbers in stored)
        # Tokens without a row in the student's LM head belong to the tail.
        return TopKTargets(logprobs.float().masked_fill(ids >= self.vocab_size, -torch.inf), ids)

    def _matrix(self, column: str, row: int) -> NDArray[Any]:
        """Return the (positions, k) values of a row."""
        positions = self._columns.column(column)[row].values
        return positions.flatten().to_numpy().reshape(len(positions), self.info["k"])[:, : self.settings.k]


def _hash(tokens: NDArray[np.int32], prompt_length: int) -> bytes:
    return hashlib.sha256(np.int32(prompt_length).tobytes() + tokens.tobytes()).digest()
