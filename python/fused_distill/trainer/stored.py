"""A teacher's top-k log-probabilities of a data set's completions, written once and read when training.

The folder holds teacher.json, which says what they are, and part-*.parquet: a row for each completion with
the SHA-256 of its prompt's length and its tokens, and the answer to it in the binary form of the server.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset
from pyarrow import Table
from rich.progress import track
from transformers import AutoTokenizer

from ..huggingface.loading import tokenizer_fingerprint
from ..serving.protocol.logprobs import Dtype, TeacherLogprobs, decode_binary, encode_binary
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
        self.places = {key: i for i, key in enumerate(self.rows.data["key"].to_pylist())}

    def check(self, top_logprobs: int, temperature: float) -> None:
        """Raises ConfigError if the store has not so many log-probabilities, or of another temperature."""
        if top_logprobs > self.info["k"] or temperature != self.info["temperature"]:
            raise ConfigError(
                f"teacher.stored: it holds k {self.info['k']} at temperature {self.info['temperature']}, "
                f"not k {top_logprobs} at {temperature}"
            )

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], *, top_logprobs: int, temperature: float
    ) -> TeacherLogprobs:
        """See TeacherClient; no actual_logprobs are kept.

        Raises:
            ConfigError: as `check`, or a sequence is not in the store.
        """
        self.check(top_logprobs, temperature)
        answers = []
        for tokens, prompt_length in zip(sequences, prompt_lengths, strict=True):
            place = self.places.get(_key(tokens, prompt_length))
            if place is None:
                raise ConfigError(f"teacher.stored: it has no completion {tokens[prompt_length:][:8]}...")
            answers.append(decode_binary(self.rows[place]["answer"]))
        whole = TeacherLogprobs.join(answers)
        return replace(whole, logprobs=whole.logprobs[:, :top_logprobs], ids=whole.ids[:, :top_logprobs])


def store_teacher(config: TrainConfig, folder: Path, dtype: Dtype) -> None:
    """Write what the folder lacks of a store for the data and the teacher of the settings.

    A part is whole or not there at all, so that an interrupted run is resumed by running it again. Several
    processes share the parts.

    Raises:
        ConfigError: a setting that does not fit, by its key; or the folder holds another store.
    """
    from .teachers import load_teacher

    if config.teacher.targets != "topk":
        raise ConfigError(f"teacher.targets: must be topk for a store, got {config.teacher.targets}")
    accelerator = Accelerator()
    tokenizer = pretrained(AutoTokenizer, "student", config.student)
    everything = config.data.model_copy(update={"evaluation_prompts": 0})
    with accelerator.local_main_process_first():
        rows, _ = load_data(config.model_copy(update={"data": everything}), tokenizer, completions=True)
    info = {
        "teacher": config.teacher.model or config.teacher.url,
        "k": config.teacher.k,
        "temperature": config.temperature,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "rows": len(rows),
    }
    described = folder / "teacher.json"
    if accelerator.is_main_process and not described.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = described.with_suffix(".tmp")
        scratch.write_text(json.dumps(info))
        scratch.replace(described)
    accelerator.wait_for_everyone()
    if json.loads(described.read_text()) != info:
        raise ConfigError(f"{folder} holds another store: {described.read_text()}")
    teacher = load_teacher(config, tokenizer, accelerator.device)
    mine = range(accelerator.process_index * PART_ROWS, len(rows), accelerator.num_processes * PART_ROWS)
    for start in track(mine, "parts", disable=not accelerator.is_main_process):
        part = folder / f"part-{start // PART_ROWS:06}.parquet"
        if not part.exists():
            scratch = part.with_suffix(".tmp")
            samples = [Sample(**rows[i]) for i in range(start, min(start + PART_ROWS, len(rows)))]
            pq.write_table(_table(samples, teacher, dtype, accelerator.device), scratch, compression="zstd")
            scratch.replace(part)
    accelerator.wait_for_everyone()


def _table(samples: list[Sample], teacher: Teacher, dtype: Dtype, device: torch.device) -> Table:
    columns: dict[str, list[bytes]] = {"key": [], "answer": []}
    for first in range(0, len(samples), BATCH_ROWS):
        batch = Batch.of(samples[first : first + BATCH_ROWS], device)
        targets = teacher.targets(batch, None)
        assert isinstance(targets, TopKTargets)
        logprobs, ids = (values[batch.mask].cpu().numpy() for values in targets)
        none = np.zeros(len(ids), np.float32)
        answers = TeacherLogprobs(
            batch.mask.sum(1).cpu().numpy(), logprobs, ids.astype(np.int32), none
        ).split()
        columns["key"] += [_key(s.tokens, len(s.prompt)) for s in batch.samples]
        columns["answer"] += [encode_binary(answer, dtype) for answer in answers]
    return Table.from_pydict(columns)


def _key(tokens: list[int], prompt_length: int) -> bytes:
    return hashlib.sha256(np.array([prompt_length, *tokens], "<i4").tobytes()).digest()
