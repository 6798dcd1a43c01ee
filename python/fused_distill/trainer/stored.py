"""A teacher's top-k log-probabilities of a data set's completions, written once and read when training.

The folder holds part-*.parquet, a row for each completion: its row in the data, its tokens, and k
log-probabilities and ids a position as raw little-endian bytes; and teacher.json, which says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from pyarrow import Table
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from ..serving.align import align
from ..serving.engine import tokenizer_fingerprint
from ..serving.wire import Answer
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data
from .student import pretrained
from .targets import StudentIds, Teacher, TopKTargets

PART_ROWS, BATCH_ROWS = 256, 16


class StoredTeacher:
    """Reads what `store_teacher` wrote.

    Raises:
        ConfigError: the folder holds no whole store.
    """

    def __init__(self, folder: Path, vocab_size: int):
        described = folder / "teacher.json"
        if not described.exists():
            raise ConfigError(f"teacher.stored: {folder} holds no teacher.json")
        self.vocab_size = vocab_size
        self.info: dict[str, Any] = json.loads(described.read_text())
        parts = sorted(folder.glob("part-*.parquet"))
        if len(parts) != -(-self.info["rows"] // PART_ROWS):
            raise ConfigError(f"teacher.stored: {folder} is not whole: run cache-teacher again")
        self.table = pq.read_table(parts)
        self.index = {row: i for i, row in enumerate(self.table["row"].to_pylist())}

    def targets(self, batch: Batch, student_ids: StudentIds) -> TopKTargets:
        """See Teacher."""
        k, kind = self.info["k"], _kind(self.info["dtype"])
        logprobs, ids = [], []
        for sample in batch.samples:
            at = self.index.get(sample.row)
            if at is None or self.table["tokens"][at].as_py() != sample.tokens:
                raise ConfigError(f"teacher.stored: it has not row {sample.row} of the data as it is")
            logprobs.append(np.frombuffer(self.table["logprobs"][at].as_py(), kind).reshape(-1, k))
            ids.append(np.frombuffer(self.table["ids"][at].as_py(), "<i4").reshape(-1, k))
        rows = np.concatenate(logprobs).astype(np.float32), np.concatenate(ids)
        lengths = batch.mask.sum(1).cpu().numpy()
        aligned = align(Answer(lengths, *rows, np.zeros(len(rows[0]), np.float32)), batch.mask)
        return TopKTargets(aligned.logprobs, aligned.ids)


def store_teacher(config: TrainConfig, folder: Path, dtype: str) -> None:
    """Write what the folder lacks of a store for the data and the teacher of the settings.

    A part is whole or not there at all, so that an interrupted run is resumed by running it again.

    Raises:
        ConfigError: a setting that does not fit, by its key; or the folder holds another store.
    """
    from .teachers import load_teacher

    if config.teacher.targets != "topk":
        raise ConfigError(f"teacher.targets: must be topk for a store, got {config.teacher.targets}")
    device = Accelerator().device
    tokenizer = pretrained(AutoTokenizer, "student", config.student)
    samples = [sample for part in load_data(config, tokenizer, completions=True) for sample in part]
    info = {
        "teacher": config.teacher.model or config.teacher.url,
        "k": config.teacher.k,
        "temperature": config.temperature,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "rows": len(samples),
    }
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "teacher.json"
    if not described.exists():
        scratch = described.with_suffix(".tmp")
        scratch.write_text(json.dumps(info))
        scratch.replace(described)
    elif json.loads(described.read_text()) != info:
        raise ConfigError(f"{folder} holds another store: {described.read_text()}")
    teacher = load_teacher(config, tokenizer, device)
    for start in track(range(0, len(samples), PART_ROWS), "parts"):
        part = folder / f"part-{start // PART_ROWS:06}.parquet"
        if not part.exists():
            scratch = part.with_suffix(".tmp")
            table = _table(samples[start : start + PART_ROWS], teacher, dtype, device)
            pq.write_table(table, scratch, compression="zstd")
            scratch.replace(part)


def _table(samples: list[Sample], teacher: Teacher, dtype: str, device: torch.device) -> Table:
    columns: dict[str, list[Any]] = {"row": [], "tokens": [], "logprobs": [], "ids": []}
    for first in range(0, len(samples), BATCH_ROWS):
        batch = Batch.of(samples[first : first + BATCH_ROWS], device)
        targets = teacher.targets(batch, Tensor)
        assert isinstance(targets, TopKTargets)
        for sample, mask, logprobs, ids in zip(batch.samples, batch.mask, *targets, strict=True):
            columns["row"].append(sample.row)
            columns["tokens"].append(sample.tokens)
            columns["logprobs"].append(logprobs[mask].cpu().numpy().astype(_kind(dtype)).tobytes())
            columns["ids"].append(ids[mask].cpu().numpy().astype("<i4").tobytes())
    return Table.from_pydict(columns)


def _kind(dtype: str) -> str:
    return f"<f{np.dtype(dtype).itemsize}"
