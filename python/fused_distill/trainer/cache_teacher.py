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

from ..huggingface.loading import find_tokenizer
from .atomic import whole_file, write_whole
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data, longest_for_teacher
from .sources import differences, fingerprints
from .start import form_group
from .stored import DESCRIPTION, is_whole, list_parts, read_description
from .student import load_pretrained
from .targets import Teacher, TopKTargets
from .teachers import check_limits, load_teachers
from .vocabulary import check_tokens

BATCH_ROWS = 16


def store_teacher(config: TrainConfig, folder: Path, dtype: Literal["float32", "float16"]) -> None:
    """Write the missing parts of a teacher store for the data and the teacher of the settings.

    A part appears complete or not at all, so running an interrupted command again resumes it. Parts that were
    cut off are written again. Several processes share the parts.

    Raises:
        ConfigError: a setting is invalid (the message names its key), or the folder holds a store of other
            data, another tokenizer, another teacher or other settings (the message names what differs).
        OSError: a file cannot be written (the message names it).
    """
    if config.teacher is None:
        raise ConfigError("teachers: a store holds one teacher: set teacher instead")
    if config.teacher.stored is not None:
        raise ConfigError("teacher.stored: a store is made with teacher.model or teacher.url")
    if config.teacher.targets != "topk":
        raise ConfigError(f"teacher.targets: must be topk for a store, got {config.teacher.targets}")
    if config.teacher.follows_student:
        raise ConfigError("teacher.model: a store holds one teacher, not one that follows the student")
    state: Any = form_group(config)
    accelerator = Accelerator(cpu=state.device.type == "cpu")
    tokenizer = load_pretrained(AutoTokenizer, "student", config.student)
    with accelerator.local_main_process_first():
        data = load_data(config, tokenizer, completions=True)
    accelerator.print(data)
    rows = data.samples
    if not len(rows):
        raise ConfigError(f"data.path: no sample can be used of {data}")
    name = config.teacher.tokenizer_name
    if name is not None and find_tokenizer(name) is None:
        accelerator.print(f"warning: {name} has no tokenizer: the student's is assumed (teacher.tokenizer)")
    teachers = load_teachers(config, tokenizer, accelerator.device)
    teacher = teachers[""]
    check_tokens(teachers, data, tokenizer, completions=True)
    info = fingerprints(rows, tokenizer, teachers) | {
        "source": config.teacher.model or config.teacher.model_dump()["url"],
        "k": config.teacher.k,
        "temperature": config.temperature,
        "vocab_size": teacher.vocab_size,
        "dtype": dtype,
        "rows": len(rows),
    }
    if accelerator.is_main_process and not (folder / DESCRIPTION).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / DESCRIPTION, json.dumps(info))
    accelerator.wait_for_everyone()
    before = read_description(folder)
    if teacher.fingerprint is not None:  # the same teacher may be reached by another path
        before["source"] = info["source"]
    if changed := differences(before, info):
        raise ConfigError(f"{folder} holds another store: {changed}. Choose another folder for a new store")
    check_limits(teachers, config, lambda: longest_for_teacher(rows))
    tokens, number = pa.list_(pa.int32()), pa.float16() if dtype == "float16" else pa.float32()
    types = {"tokens": tokens, "prompt_length": pa.int32(), "ids": pa.list_(tokens)}
    schema = pa.schema(types | {"logprobs": pa.list_(pa.list_(number))})
    parts = list_parts(folder, len(rows))
    if written := sum(is_whole(*part) for part in parts.items()):
        accelerator.print(f"{folder}: {written} of {len(parts)} parts are written already")
    own = [*parts.items()][accelerator.process_index :: accelerator.num_processes]
    for part, part_rows in track(own, "parts", disable=not accelerator.is_main_process):
        if not is_whole(part, part_rows):
            samples = [Sample(**rows[i]) for i in part_rows]
            scored = score(samples, teacher, getattr(torch, dtype), accelerator.device)
            with whole_file(part) as scratch:
                pq.write_table(pa.Table.from_pylist(scored, schema), scratch, compression="zstd")
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
