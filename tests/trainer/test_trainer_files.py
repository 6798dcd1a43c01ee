"""Tests of reading data files: formats, patterns, and what is said of files that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fused_distill.trainer.config import ConfigError, DataConfig
from fused_distill.trainer.data import load_data
from fused_distill.trainer.files import read_rows
from pyarrow import parquet
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED
ROWS = [{"prompt": f"a{i}", "completion": "b" * i} for i in range(1, 6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path | str) -> list[Any]:
    return read_rows(DataConfig.model_validate({"path": str(path)})).table.to_list()


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda path: path.write_text(LINES)),
        ("rows.ndjson", lambda path: path.write_text(LINES)),
        ("rows.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("ROWS.JSONL.GZ", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_cells_of_csv_are_text_whatever_they_look_like(tmp_path: Path, compress: Any) -> None:
    name = "rows.csv" if compress is bytes else "rows.csv.gz"
    cells = ["4", "007", "1.50", "None", "NA", "null", "true", "2024-01-01", "a, b"]
    text = "\ufeffprompt,completion\r\n" + "".join(f'q,"{cell}"\r\n' for cell in [*cells, ""])
    (tmp_path / name).write_bytes(compress(text.encode()))
    assert read(tmp_path / name) == [{"prompt": "q", "completion": cell} for cell in [*cells, None]]


def test_names_of_files_and_folders_may_look_like_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "a [1] b?"
    folder.mkdir()
    (folder / "rows*[x].jsonl").write_text(LINES)
    assert read(folder / "rows*[x].jsonl") == ROWS
    assert read(f"{tmp_path}/a*/*.jsonl") == ROWS


def test_a_pattern_reads_its_files_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps({"prompt": str(i)}) + "\n")
    assert [row["prompt"] for row in read(tmp_path / "part-*.jsonl")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "b"\n',
            r"a.jsonl: line 2 is no JSON .*: '{\"prompt\": \"b\"'",
        ),
        (
            "a.json",
            b'[{"prompt": "a"},\n{"prompt": b}]',
            r"a.json: line 2 is no JSON .*: '{\"prompt\": b}\]'",
        ),
        (
            "a.jsonl",
            '{"prompt": "a\u2028\x85b"}\n{"prompt": \n'.encode(),
            r"a.jsonl: line 2 is no JSON .*: '{\"prompt\": '",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', r"line 2 must be an object of columns, got \[1\]"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": ["b"]}\n',
            r"line 3, column prompt: \['b'\] is a list, but line 1 has text",
        ),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"prompt\n\xff\n", "a.csv cannot be read: .*utf-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "a.jsonl.gz cannot be read: "),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read: "),
        ("a.txt", b"text", "a.txt must end with one of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.path: .*{message}") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path: there is no file .*none.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"data.path: no file matches .*none-\*.jsonl"):
        read(tmp_path / "none-*.jsonl")


def test_files_of_a_pattern_must_have_one_format(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(ConfigError, match="must all have one of the formats"):
        read(tmp_path / "a.*")


def test_text_in_another_encoding_is_named(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    config = lab.config(tmp_path / "run", f"data.path={tmp_path}/a.jsonl")
    with pytest.raises(ConfigError, match=r"a.jsonl is not UTF-8 text: .* at byte 12"):
        load_data(config, tokenizer, completions=False)


def test_an_invalid_row_is_named_with_its_file(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_text(LINES)
    (tmp_path / "part-1.jsonl").write_text('{"prompt": "a"}\n{"completion": "a"}\n')
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    config = lab.config(tmp_path / "run", f"data.path={tmp_path}/part-*.jsonl")
    with pytest.raises(
        ConfigError, match=r"part-1.jsonl: row 1: must have exactly one of the columns prompt"
    ):
        load_data(config, tokenizer, completions=False)


def write_parquet_of(value: Any) -> Any:
    return lambda path: parquet.write_table(pa.table({"prompt": [value]}), path)


@pytest.mark.parametrize(
    ("extension", "writers", "message"),
    [
        (
            "jsonl",
            [lambda path: path.write_text('{"prompt": 3}'), lambda path: path.write_text('{"prompt": "a"}')],
            "column prompt is string in .*1.jsonl, but int64 in .*0.jsonl",
        ),
        (
            "csv",
            [lambda path: path.write_text("prompt\na\n"), lambda path: path.write_text("question\na\n")],
            "column prompt is absent in .*1.csv, but string in .*0.csv",
        ),
        (
            "jsonl",
            [
                lambda path: path.write_text('{"x": 1, "prompt": "a"}'),
                lambda path: path.write_text('{"prompt": ["a"]}'),
            ],
            "column prompt is of lists or objects in .*1.jsonl, but string in .*0.jsonl",
        ),
        (
            "parquet",
            [write_parquet_of("a"), write_parquet_of([1])],
            "column prompt is of lists or objects in .*1.parquet, but string in .*0.parquet",
        ),
    ],
)
def test_files_whose_columns_differ_are_named(
    tmp_path: Path, extension: str, writers: list[Any], message: str
) -> None:
    for i, write in enumerate(writers):
        write(tmp_path / f"{i}.{extension}")
    with pytest.raises(ConfigError, match=f"^data.path: all files must have the same columns .*: {message}$"):
        read(tmp_path / f"*.{extension}")


@pytest.mark.parametrize(("key", "value"), [("name", "main"), ("split", "test")])
def test_a_file_has_no_configurations_and_splits(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    config = DataConfig.model_validate({"path": f"{tmp_path}/a.jsonl", key: value})
    with pytest.raises(
        ConfigError, match=rf"^data.{key}: {value} is of a dataset, but data.path .* is a file"
    ):
        read_rows(config)


def test_a_list_of_files_and_patterns_is_read_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("c.jsonl", "a1.jsonl", "a2.jsonl", "b.jsonl.gz")
    for name in names:
        text = json.dumps({"prompt": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    paths = ["~/c.jsonl", f"{tmp_path}/a*.jsonl", f"{tmp_path}/b.jsonl.gz"]
    rows = read_rows(DataConfig.model_validate({"path": paths}))
    assert rows.table["prompt"][:] == list(names)
    assert rows.locate(3) == f"{tmp_path}/b.jsonl.gz: row 0"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a.jsonl", "none.jsonl"], "there is no file none.jsonl"),
        (["a.jsonl", "org/name"], "a list must hold files, got org/name"),
        (["a.jsonl", "a.csv"], "the files of a.jsonl, a.csv must all have one of the formats"),
    ],
)
def test_a_list_with_what_is_no_file_of_its_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.csv"):
        Path(name).write_text(LINES)
    with pytest.raises(ConfigError, match=f"^data.path: {message}"):
        read_rows(DataConfig.model_validate({"path": paths}))
