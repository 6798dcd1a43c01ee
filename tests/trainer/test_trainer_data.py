"""Tests of loading, tokenizing, ordering and batching the data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.data import Batch, Sample, load_data, sample_stream, split_data
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED
CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CUT = ", 2 completions cut at 6 tokens (rollouts.max_completion_length)"


@pytest.fixture
def tokenizer(lab: Lab) -> Any:
    return transformers.AutoTokenizer.from_pretrained(lab.student)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def chat(*contents: str) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def load(config: TrainConfig, tokenizer: Any, completions: bool) -> tuple[Dataset, list[Sample]]:
    return split_data(load_data(config, tokenizer, completions), config)


def text(tokenizer: Any, tokens: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_jsonl_parquet_and_a_dataset_split_give_the_same_samples(
    lab: Lab, tmp_path: Path, tokenizer: Any
) -> None:
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    table = arrow_json.read_json(lab.data)
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set" / "test-00000.parquet")
    parquet.write_table(table.slice(5), tmp_path / "set" / "train-00000.parquet")
    jsonl, _ = load(lab.config(tmp_path), tokenizer, completions=True)
    for source in (["data.path={}/rows.parquet"], ["data.path={}/set", "data.split=test"]):
        config = lab.config(tmp_path, *(one.format(tmp_path) for one in source))
        assert load(config, tokenizer, completions=True)[0].to_list() == jsonl.to_list()
    assert len(jsonl) == 40


def test_the_last_rows_are_held_out(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    training, held_out = load(lab.config(tmp_path, "data.evaluation_prompts=3"), tokenizer, completions=False)
    assert list(training["row"]) == list(range(37))
    assert [s.row for s in held_out] == [37, 38, 39]


def test_completions_end_with_eos_and_are_cut_to_length(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "ab", "completion": "cdefghi"}]
    config = lab.config(tmp_path, write_rows(tmp_path, rows), "prompts_per_step=1")
    training, _ = load(config, tokenizer, completions=True)
    short, long = (Sample(**training[i]) for i in range(2))
    assert text(tokenizer, short.prompt + short.completion) == "abcde<eos>"
    assert text(tokenizer, long.completion) == "cdefgh"
    assert (short.truncated, long.truncated) == (False, True)


def test_messages_go_through_the_chat_template(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    config = lab.config(tmp_path, write_rows(tmp_path, rows), "prompts_per_step=1")
    training, _ = load(config, tokenizer, completions=False)
    assert [text(tokenizer, prompt) for prompt in training["prompt"]] == ["u:hi;a:"]
    assert list(training["completion"]) == [[]]


def test_the_assistants_last_message_is_the_completion(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    turns = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"))]
    config = lab.config(tmp_path, write_rows(tmp_path, [{"messages": turns}]), "prompts_per_step=1")
    training, _ = load(config, tokenizer, completions=True)
    [sample] = (Sample(**training[i]) for i in range(len(training)))
    assert text(tokenizer, sample.prompt) == "u:hi;a:"
    assert text(tokenizer, sample.completion) == "yo;"


def test_a_dataset_configuration_is_chosen_by_name(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "set"
    for name in ("main", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    parts = [f"- config_name: {n}\n  data_files: {n}/train.jsonl" for n in ("main", "other")]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *parts, "---"]))
    config = lab.config(tmp_path, f"data.path={folder}", "data.name=other", "prompts_per_step=1")
    training, _ = load(config, tokenizer, completions=False)
    assert [text(tokenizer, prompt) for prompt in training["prompt"]] == ["other"]


def test_empty_and_long_prompts_are_dropped(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": p} for p in ("abcd", "", "abcde", "a")]
    config = lab.config(
        tmp_path, write_rows(tmp_path, rows), "prompts_per_step=1", "data.max_prompt_length=4"
    )
    training, _ = load(config, tokenizer, completions=False)
    assert list(training["row"]) == [0, 3]


def test_samples_of_one_row_are_not_in_training_and_held_out(
    lab: Lab, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = CHAT
    row = {"messages": chat("ab", "cd", "ef", "gh", "ij", "kl")}
    overrides = ("data.train_on=all_turns", "data.evaluation_prompts=2", "prompts_per_step=1")
    config = lab.config(tmp_path, write_rows(tmp_path, [row, row]), *overrides)
    training, held_out = load(config, tokenizer, completions=True)
    assert list(training["row"]) == [0, 0, 0]
    assert [sample.row for sample in held_out] == [1, 1]


def test_what_was_dropped_is_said_with_the_reason(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": p} for p in ("abcd", "", "abcde", "a", "abcdef")]
    config = lab.config(tmp_path, write_rows(tmp_path, rows), "data.max_prompt_length=4")
    assert str(load_data(config, tokenizer, completions=False)) == (
        f"{config.data.path}: 5 rows, 2 samples used, 1 dropped: empty prompt, "
        "2 dropped: prompt longer than 4 tokens (data.max_prompt_length)"
    )


@pytest.mark.parametrize(("completions", "end"), [(True, CUT), (False, "")])
def test_completions_of_the_data_that_are_cut_are_counted(
    lab: Lab, tmp_path: Path, tokenizer: Any, completions: bool, end: str
) -> None:
    rows = [{"prompt": "ab", "completion": text} for text in ("cde", "cdefghi", "cdefghij")]
    config = lab.config(tmp_path, write_rows(tmp_path, rows))
    told = str(load_data(config, tokenizer, completions))
    assert told == f"{config.data.path}: 3 rows, 3 samples used{end}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "answer": "b", "empty": None},
            "must have a completion, got prompt, answer. Rename the answers' column to completion, or train ",
        ),
        (
            {"messages": chat("hi")},
            "column messages: must end with a message of the assistant, the completion. Add it, or train ",
        ),
    ],
)
def test_a_row_without_a_completion_is_told_what_to_do(
    lab: Lab, tmp_path: Path, tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    tokenizer.chat_template = CHAT
    config = lab.config(tmp_path, write_rows(tmp_path, [row]))
    with pytest.raises(ConfigError) as error:
        load_data(config, tokenizer, completions=True)
    assert f"row 0: {message}on-policy only with lmbda: 1" in str(error.value)


def test_too_few_samples_are_explained(lab: Lab, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": p} for p in ("abcd", "", "abcde")]
    config = lab.config(tmp_path, write_rows(tmp_path, rows), "data.evaluation_prompts=2")
    message = (
        r"prompts_per_step: 8 is too many: 0 samples are left for training of .*1 dropped: empty prompt; "
    )
    with pytest.raises(ConfigError, match=message + r"2 held out \(data.evaluation_prompts\)"):
        load(config, tokenizer, completions=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data.max_prompt_length=1",),
            r"^data\.max_prompt_length: 1 leaves 0 samples, fewer than the 4 of a step \(prompts_per_step\), "
            r"because 10 are longer: raise it\. .*: 10 rows",
        ),
        (
            ("data.evaluation_prompts=16",),
            r"^data\.evaluation_prompts: 16 is too many: 0 of 10 samples are left for training, fewer than ",
        ),
        (
            ("data.evaluation_prompts=7",),
            r"^data\.evaluation_prompts: 7 is too many: 3 of 10 samples .* Hold out fewer, 0 for none",
        ),
    ],
)
def test_the_setting_that_leaves_too_few_samples_is_named(
    lab: Lab, tmp_path: Path, tokenizer: Any, overrides: tuple[str, ...], message: str
) -> None:
    rows = write_rows(tmp_path, [{"prompt": "abcd"}] * 10)
    with pytest.raises(ConfigError, match=message):
        load(lab.config(tmp_path, rows, "prompts_per_step=4", *overrides), tokenizer, completions=False)


def test_the_sample_stream_starts_at_any_position() -> None:
    samples = [Sample(i, [1], [])._asdict() for i in range(7)]
    stream = list(islice(sample_stream(samples, 3, 0), 30))
    for start in (0, 5, 7, 16):
        assert list(islice(sample_stream(samples, 3, start), 30 - start)) == stream[start:]


def test_every_epoch_has_every_sample_in_its_own_order() -> None:
    samples = [Sample(i, [1], [])._asdict() for i in range(7)]
    rows = [s.row for s in islice(sample_stream(samples, 3, 0), 21)]
    epochs = [rows[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_valid_tokens_are_those_whose_next_token_belongs_to_a_completion() -> None:
    samples = [Sample(0, [5, 6], [7, 8, 9]), Sample(1, [5, 6, 7], [8]), Sample(2, [5], [])]
    batch = Batch.collate(samples, torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 0], [5, 0, 0, 0, 0]]
    assert batch.attention.sum(1).tolist() == [5, 4, 1]
    assert batch.valid.tolist() == [1, 2, 3, 7]
    assert batch.lengths == [3, 1, 0]
    assert batch.pack(batch.tokens.unsqueeze(-1)).squeeze(-1).tolist() == [6, 7, 8, 7]
