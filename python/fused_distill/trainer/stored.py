"""A teacher's top-k log-probabilities of a data set's completions, written once and read when training.

The folder holds part-*.parquet, a row for each completion: its row in the data, its tokens, and k
log-probabilities and ids a position as raw little-endian bytes; and teacher.json, which says what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from pyarrow import Table
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer

from ..serving.align import align
from ..serving.engine import tokenizer_fingerprint
from ..serving.wire import Answer
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_prompts
from .targets import StudentIds, Teacher, TopKTargets

PART_ROWS, BATCH_ROWS = 256, 16


def write_teacher(
    folder: Path, samples: list[Sample], teacher: Teacher, info: dict[str, Any], device: torch.device
) -> Iterator[int]:
    """Write what is missing of a store, part by part; yields how many completions are there.

    A part is whole or not there at all, so that an interrupted run is resumed by running it again.

    Args:
        folder: of the store.
        samples: the data's completions.
        teacher: whose targets are "topk".
        info: k, temperature, dtype of the log-probabilities and tokenizer_fingerprint.
        device: of the teacher.

    Raises:
        ConfigError: the folder holds another store.
    """
    info = {**info, "rows": len(samples)}
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "teacher.json"
    if described.exists() and json.loads(described.read_text()) != info:
        raise ConfigError(f"{folder} holds another store: {described.read_text()}")
    described.write_text(json.dumps(info))
    kind = f"<f{np.dtype(info['dtype']).itemsize}"
    for start in range(0, len(samples), PART_ROWS):
        part = folder / f"part-{start // PART_ROWS:06}.parquet"
        some = samples[start : start + PART_ROWS]
        if not part.exists():
            columns: dict[str, list[Any]] = {"row": [], "tokens": [], "logprobs": [], "ids": []}
            for first in range(0, len(some), BATCH_ROWS):
                batch = Batch.of(some[first : first + BATCH_ROWS], device)
                targets = teacher.targets(batch, _nobodys_ids)
                assert isinstance(targets, TopKTargets)
                for i, sample in enumerate(batch.samples):
                    here = batch.mask[i]
                    columns["row"].append(sample.row)
                    columns["tokens"].append([*sample.prompt, *sample.completion])
                    columns["logprobs"].append(targets.logprobs[i, here].cpu().numpy().astype(kind).tobytes())
                    columns["ids"].append(targets.ids[i, here].cpu().numpy().astype("<i4").tobytes())
            scratch = part.with_suffix(".tmp")
            pq.write_table(Table.from_pydict(columns), scratch, compression="zstd")
            scratch.replace(part)
        yield start + len(some)


def _nobodys_ids() -> Tensor:
    raise ConfigError("teacher.targets: a store holds the teacher's own top k")


def store_teacher(config: TrainConfig, folder: Path, dtype: str) -> None:
    """`write_teacher` for the data and the teacher of the settings.

    Raises:
        ConfigError: a setting that does not fit, by its key.
    """
    from .teachers import load_teacher

    if config.teacher.targets != "topk":
        raise ConfigError(f"teacher.targets: must be topk for a store, got {config.teacher.targets}")
    device = Accelerator().device
    tokenizer: Any = AutoTokenizer.from_pretrained(config.student)
    prompts = [prompt for part in load_prompts(config, tokenizer) for prompt in part]
    missing = next((p.row for p in prompts if p.completion is None), None)
    if missing is not None:
        raise ConfigError(f"data.path: row {missing} has no completion to store the teacher of")
    samples = [Sample(p.row, p.tokens, p.completion or []) for p in prompts]
    info = {
        "k": config.teacher.k,
        "temperature": config.temperature,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    teacher = load_teacher(config, tokenizer, device)
    with Progress(*Progress.get_default_columns()) as progress:
        task = progress.add_task("completions", total=len(samples))
        for done in write_teacher(folder, samples, teacher, info, device):
            progress.update(task, completed=done)


class StoredTeacher:
    """Reads what `write_teacher` wrote.

    Raises:
        ConfigError: the folder holds no whole store.
    """

    def __init__(self, folder: Path):
        described = folder / "teacher.json"
        if not described.exists():
            raise ConfigError(f"teacher.stored: {folder} holds no teacher.json")
        self.info: dict[str, Any] = json.loads(described.read_text())
        self.table = pq.read_table(sorted(folder.glob("part-*.parquet")), memory_map=True)
        self.index = {row: i for i, row in enumerate(self.table["row"].to_pylist())}
        if len(self.index) != self.info["rows"]:
            raise ConfigError(f"teacher.stored: {folder} holds {len(self.index)} of {self.info['rows']} rows")

    def targets(self, batch: Batch, student_ids: StudentIds) -> TopKTargets:
        """See Teacher."""
        k, kind = self.info["k"], f"<f{np.dtype(self.info['dtype']).itemsize}"
        logprobs, ids = [], []
        for sample in batch.samples:
            at = self.index.get(sample.row)
            if at is None or self.table["tokens"][at].as_py() != [*sample.prompt, *sample.completion]:
                raise ConfigError(f"teacher.stored: it has not row {sample.row} of the data as it is")
            logprobs.append(np.frombuffer(self.table["logprobs"][at].as_py(), kind).reshape(-1, k))
            ids.append(np.frombuffer(self.table["ids"][at].as_py(), "<i4").reshape(-1, k))
        rows = np.concatenate(logprobs).astype(np.float32), np.concatenate(ids)
        lengths = batch.mask.sum(1).cpu().numpy()
        aligned = align(Answer(lengths, *rows, np.zeros(len(rows[0]), np.float32)), batch.mask)
        return TopKTargets(aligned.logprobs, aligned.ids)
