"""A teacher's top-k log-probabilities of a data set's completions, written once and read when training.

The folder holds teacher.json, which says what they are, and part-*.parquet: a row for each completion with
the SHA-256 of its prompt's length and its tokens, and k log-probabilities and ids a position as raw
little-endian bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset
from pyarrow import Table
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from ..serving.engine import tokenizer_fingerprint
from ..serving.wire import Answer
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data
from .student import pretrained
from .targets import Teacher, TopKTargets

PART_ROWS, BATCH_ROWS = 256, 16


class StoredTeacher:
    """Answers from what `store_teacher` wrote, as a TeacherClient does; the numbers stay in mapped files.

    Raises:
        ConfigError: the folder holds no whole store.
    """

    def __init__(self, folder: Path):
        described = folder / "teacher.json"
        if not described.exists():
            raise ConfigError(f"teacher.stored: {folder} holds no teacher.json")
        self.info: dict[str, Any] = json.loads(described.read_text())
        parts: list[Any] = sorted(map(str, folder.glob("part-*.parquet")))
        if len(parts) != -(-self.info["rows"] // PART_ROWS):
            raise ConfigError(f"teacher.stored: {folder} is not whole: run cache-teacher again")
        self.rows: Any = Dataset.from_parquet(parts)
        self.places = {key: i for i, key in enumerate(self.rows["key"])}

    def check(self, top_logprobs: int, temperature: float) -> None:
        """Raises ConfigError if the store has not so many log-probabilities, or of another temperature."""
        if top_logprobs > self.info["k"] or temperature != self.info["temperature"]:
            raise ConfigError(
                f"teacher.stored: it holds k {self.info['k']} at temperature {self.info['temperature']}, "
                f"not k {top_logprobs} at {temperature}"
            )

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], *, top_logprobs: int, temperature: float
    ) -> Answer:
        """See TeacherClient; no actual_logprobs are kept.

        Raises:
            ConfigError: as `check`, or a sequence is not in the store.
        """
        self.check(top_logprobs, temperature)
        kind, answers = _kind(self.info["dtype"]), []
        for tokens, prompt_length in zip(sequences, prompt_lengths, strict=True):
            place = self.places.get(_key(tokens, prompt_length))
            if place is None:
                raise ConfigError(f"teacher.stored: it has no completion {tokens[prompt_length:][:8]}...")
            row = self.rows[place]
            logprobs, ids = (
                np.frombuffer(row[name], dtype).reshape(-1, self.info["k"])[:, :top_logprobs]
                for name, dtype in (("logprobs", kind), ("ids", "<i4"))
            )
            none = np.zeros(len(ids), np.float32)
            answers.append(Answer(np.array([len(ids)]), logprobs.astype(np.float32), ids, none))
        return Answer.join(answers)


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
    everything = config.data.model_copy(update={"evaluation_prompts": 0})
    rows, _ = load_data(config.model_copy(update={"data": everything}), tokenizer, completions=True)
    info = {
        "teacher": config.teacher.model or config.teacher.url,
        "k": config.teacher.k,
        "temperature": config.temperature,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "rows": len(rows),
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
    for start in track(range(0, len(rows), PART_ROWS), "parts"):
        part = folder / f"part-{start // PART_ROWS:06}.parquet"
        if not part.exists():
            scratch = part.with_suffix(".tmp")
            samples = [Sample(**rows[i]) for i in range(start, min(start + PART_ROWS, len(rows)))]
            pq.write_table(_table(samples, teacher, dtype, device), scratch, compression="zstd")
            scratch.replace(part)


def _table(samples: list[Sample], teacher: Teacher, dtype: str, device: torch.device) -> Table:
    columns: dict[str, list[bytes]] = {"key": [], "logprobs": [], "ids": []}
    for first in range(0, len(samples), BATCH_ROWS):
        batch = Batch.of(samples[first : first + BATCH_ROWS], device)
        targets = teacher.targets(batch, Tensor)
        assert isinstance(targets, TopKTargets)
        for sample, mask, logprobs, ids in zip(batch.samples, batch.mask, *targets, strict=True):
            columns["key"].append(_key(sample.tokens, len(sample.prompt)))
            columns["logprobs"].append(logprobs[mask].cpu().numpy().astype(_kind(dtype)).tobytes())
            columns["ids"].append(ids[mask].cpu().numpy().astype("<i4").tobytes())
    return Table.from_pydict(columns)


def _key(tokens: list[int], prompt_length: int) -> bytes:
    return hashlib.sha256(np.array([prompt_length, *tokens], "<i4").tobytes()).digest()


def _kind(dtype: str) -> str:
    return f"<f{np.dtype(dtype).itemsize}"
