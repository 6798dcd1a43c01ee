"""Write a teacher store, see `stored`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from rich.progress import track
from transformers import AutoTokenizer

from ..huggingface.loading import tokenizer_fingerprint
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data, longest_for_teacher
from .stored import DESCRIPTION, PART_ROWS
from .student import load_pretrained
from .targets import Teacher, TopKTargets
from .teachers import check_limits, load_teachers

BATCH_ROWS = 16


def store_teacher(config: TrainConfig, folder: Path, dtype: Literal["float32", "float16"]) -> None:
    """Write the missing parts of a teacher store for the data and the teacher of the settings.

    A part appears complete or not at all, so running an interrupted command again resumes it. Several
    processes share the parts.

    Raises:
        ConfigError: a setting is invalid (the message names its key), or the folder holds another store.
    """
    if config.teacher is None:
        raise ConfigError("teachers: a store holds one teacher: set teacher instead")
    if config.teacher.targets != "topk":
        raise ConfigError(f"teacher.targets: must be topk for a store, got {config.teacher.targets}")
    accelerator = Accelerator()
    tokenizer = load_pretrained(AutoTokenizer, "student", config.student)
    with accelerator.local_main_process_first():
        data = load_data(config, tokenizer, completions=True)
    accelerator.print(data)
    rows = data.samples
    info = {
        "teacher": config.teacher.model or config.teacher.model_dump()["url"],
        "k": config.teacher.k,
        "temperature": config.temperature,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "rows": len(rows),
    }
    description = folder / DESCRIPTION
    if accelerator.is_main_process and not description.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = description.with_suffix(".tmp")
        scratch.write_text(json.dumps(info))
        scratch.replace(description)
    accelerator.wait_for_everyone()
    if json.loads(description.read_text()) != info:
        raise ConfigError(f"{folder} holds another store: {description.read_text()}")
    teachers = load_teachers(config, tokenizer, accelerator.device)
    check_limits(teachers, config, lambda: longest_for_teacher(rows))
    tokens, number = pa.list_(pa.int32()), pa.float16() if dtype == "float16" else pa.float32()
    types = {"tokens": tokens, "prompt_length": pa.int32(), "ids": pa.list_(tokens)}
    schema = pa.schema(types | {"logprobs": pa.list_(pa.list_(number))})
    first, interval = (n * PART_ROWS for n in (accelerator.process_index, accelerator.num_processes))
    for start in track(range(first, len(rows), interval), "parts", disable=not accelerator.is_main_process):
        part = folder / f"part-{start // PART_ROWS:06}.parquet"
        if not part.exists():
            samples = [Sample(**rows[i]) for i in range(start, min(start + PART_ROWS, len(rows)))]
            scored = score(samples, teachers[""], getattr(torch, dtype), accelerator.device)
            scratch = part.with_suffix(".tmp")
            pq.write_table(pa.Table.from_pylist(scored, schema), scratch, compression="zstd")
            scratch.replace(part)
    accelerator.wait_for_everyone()


def score(
    samples: list[Sample], teacher: Teacher, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rows of a store for some samples."""
    rows: list[dict[str, Any]] = []
    for first in range(0, len(samples), BATCH_ROWS):
        batch = Batch.collate(samples[first : first + BATCH_ROWS], device).for_teacher()
        targets = teacher.targets(batch, None)
        assert isinstance(targets, TopKTargets)
        finite = targets.logprobs.clamp(min=torch.finfo(dtype).min)  # -inf marks an absent token
        stored = torch.where(targets.logprobs.isneginf(), targets.logprobs, finite).to(dtype)
        columns = (values.cpu().split(batch.lengths) for values in (targets.ids.int(), stored))
        for sample, ids, logprobs in zip(batch.samples, *columns, strict=True):
            row = {"tokens": sample.tokens, "prompt_length": len(sample.prompt)}
            rows.append(row | {"ids": [*ids.numpy()], "logprobs": [*logprobs.numpy()]})
    return rows
