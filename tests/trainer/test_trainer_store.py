"""Tests of teacher stores: written by cache_teacher, read by StoredTeacher and by other libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from fused_distill.cli import main
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer import cache_teacher, start, stored
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.config import ConfigError, TeacherConfig
from fused_distill.trainer.data import Batch, Sample
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.targets import Kind, TopKTargets
from pyarrow import parquet
from serving_cases import serving
from trainer_cases import NOT_INTERPRETED, Lab, losses, save_model, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with serving(TransformersEngine.load(str(lab.teacher), "cpu", "float32")) as served:
        yield served.url


TOPK = ("teacher.targets=topk", "teacher.k=5", "lmbda=0", "temperature=1.5", "data.evaluation_prompts=8")


def test_local_served_and_stored_top_k_give_the_same_losses(lab: Lab, url: str, tmp_path: Path) -> None:
    local, served = f"teacher.model={lab.teacher}", f"teacher.url={url}"
    for source, name in ((local, "by_model"), (served, "by_server")):
        store_teacher(lab.config(tmp_path / name, *TOPK, source), tmp_path / name / "store", "float32")
    train(lab.config(tmp_path / "local", *TOPK, local))
    train(lab.config(tmp_path / "served", *TOPK, served))
    for name in ("by_model", "by_server"):
        source = f"teacher={{stored: {tmp_path}/{name}/store, targets: topk, k: 5}}"
        train(lab.config(tmp_path / name, *TOPK, source))
    want = losses(tmp_path / "local")
    for name in ("served", "by_model", "by_server"):
        assert losses(tmp_path / name) == pytest.approx(want, rel=1e-4), name


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_store_resumes_byte_for_byte(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PART_ROWS", 16)
    config = lab.config(tmp_path, *TOPK)
    store_teacher(config, tmp_path / "at_once", "float32")
    complete = bytes_of(tmp_path / "at_once")
    assert sorted(complete) == [*(f"part-{i:06}.parquet" for i in range(3)), "teacher.json"]

    write_table = parquet.write_table

    def dies(table: Any, path: Path, **options: Any) -> None:
        write_table(table, path, **options)
        if path.name.startswith("part-000001"):
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        store_teacher(config, tmp_path / "resumed", "float32")
    with pytest.raises(ConfigError, match=r"teacher\.stored: .* is not complete: run cache-teacher again"):
        Trainer(lab.config(tmp_path, *TOPK, f"teacher={{stored: {tmp_path}/resumed, targets: topk, k: 5}}"))
    monkeypatch.setattr(parquet, "write_table", write_table)
    store_teacher(config, tmp_path / "resumed", "float32")
    assert bytes_of(tmp_path / "resumed") == complete


def test_a_float16_store_holds_rounded_logprobs_of_the_same_ids(lab: Lab, tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        config = lab.config(tmp_path / dtype, *TOPK)
        store_teacher(config, tmp_path / dtype / "store", dtype)
        source = f"teacher={{stored: {tmp_path}/{dtype}/store, targets: topk, k: 5}}"
        train(lab.config(tmp_path / dtype, *TOPK, source))
    half, single = (
        parquet.read_table(tmp_path / dtype / "store" / "part-000000.parquet")
        for dtype in ("float16", "float32")
    )
    assert half.schema.field("logprobs").type.value_type.value_type == pa.float16()
    assert single.schema.field("logprobs").type.value_type.value_type == pa.float32()
    assert half["ids"] == single["ids"]
    for half_row, row in zip(half["logprobs"].to_pylist(), single["logprobs"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.array(half_row), np.array(row, np.float32).astype(np.float16))
    assert losses(tmp_path / "float16") == pytest.approx(losses(tmp_path / "float32"), rel=1e-2)
    assert losses(tmp_path / "float16") != losses(tmp_path / "float32")


def test_finite_logprobs_stay_finite_in_float16() -> None:
    class FarApart:
        settings = TeacherConfig.model_validate({"model": "teacher"})
        kind: Kind = "topk"
        vocab_size = 98
        fingerprint: str | None = None

        def targets(self, batch: Batch, student_ids: torch.Tensor | None) -> TopKTargets:
            logprobs = torch.tensor([-0.5, -1e6, -torch.inf]).expand(len(batch.valid), 3)
            return TopKTargets(logprobs, torch.zeros(logprobs.shape, dtype=torch.int64))

    [row] = cache_teacher.score([Sample(0, [5], [6])], FarApart(), torch.float16, torch.device("cpu"))
    assert [logprobs.tolist() for logprobs in row["logprobs"]] == [[-0.5, -65504.0, -np.inf]]


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store_teacher(lab.config(folder / "output", *TOPK), folder / "teacher-store", "float32")
    return folder / "teacher-store"


def expected_rows(lab: Lab) -> list[tuple[list[int], int, torch.Tensor]]:
    """Return tokens, prompt length and the teacher's log-probabilities (positions, 98) of the data's rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(lab.teacher).eval()
    rows: list[tuple[list[int], int, torch.Tensor]] = []
    for line in lab.data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = prompt + [*tokenizer(row["completion"])["input_ids"], 1][:6]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1, :98]
        rows.append((tokens, len(prompt), (logits.double() / 1.5).log_softmax(-1)))
    return rows


def assert_holds_the_teachers_logprobs(lab: Lab, rows: list[dict[str, Any]]) -> None:
    """Compare the rows of a store with log-probabilities of the teacher's own logits."""
    expected = expected_rows(lab)
    assert len(rows) == len(expected) == 40
    for row, (tokens, prompt_length, logprobs) in zip(rows, expected, strict=True):
        assert [*row["tokens"]] == tokens
        assert row["prompt_length"] == prompt_length
        assert len(row["ids"]) == len(row["logprobs"]) == len(logprobs)
        ids, values = (np.stack([*row[name]]) for name in ("ids", "logprobs"))
        np.testing.assert_allclose(values, logprobs.topk(5).values, rtol=1e-4, atol=1e-5)
        at_ids = logprobs.gather(-1, torch.tensor(ids).long())
        np.testing.assert_allclose(values, at_ids, rtol=1e-4, atol=1e-5)


def test_pandas_and_datasets_read_a_store_as_the_documentation_says(
    lab: Lab, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    names: dict[str, Any] = {"pandas": pandas, "datasets": datasets, "glob": glob}
    page = Path(__file__).parents[2] / "docs" / "training-settings.md"
    blocks = [part.split("```")[0] for part in page.read_text().split("```py\n")[1:]]
    exec(next(block for block in blocks if "parquet" in block), names)
    assert_holds_the_teachers_logprobs(lab, [dict(row) for _, row in names["table"].iterrows()])
    assert_holds_the_teachers_logprobs(lab, names["rows"].to_list())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.k=6", r"it holds k 5 at temperature 1\.5, not k 6 at 1\.5"),
        ("temperature=1", r"it holds k 5 at temperature 1\.5, not k 5 at 1\.0"),
        ("teacher.stored=/nowhere", "/nowhere holds no teacher.json"),
    ],
)
def test_a_store_with_fewer_tokens_or_another_temperature_is_refused(
    lab: Lab, store: Path, tmp_path: Path, override: str, message: str
) -> None:
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    with pytest.raises(ConfigError, match=f"teacher.stored: {message}"):
        Trainer(lab.config(tmp_path, *TOPK, source, override))


def test_every_smaller_k_can_be_read_from_a_store(lab: Lab, store: Path, tmp_path: Path) -> None:
    train(lab.config(tmp_path / "local", *TOPK, "teacher.k=3"))
    train(lab.config(tmp_path / "stored", *TOPK, f"teacher={{stored: {store}, targets: topk, k: 3}}"))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_samples_that_are_not_in_the_store_are_named_before_the_first_step(
    lab: Lab, store: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    lines = lab.data.read_text().splitlines(keepends=True)
    data.write_text(
        "".join([*lines[:30], json.dumps({"prompt": "x", "completion": "y"}) + "\n", *lines[31:]])
    )
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    message = rf"teacher\.stored: {store} was made from other data.* 1 of 40 samples of {data}, .* row 30$"
    with pytest.raises(ConfigError, match=message):
        Trainer(lab.config(tmp_path, *TOPK, source, f"data.path={data}"))


def test_a_part_of_the_data_can_be_trained_on(lab: Lab, store: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(lab.data.read_text().splitlines(keepends=True)[:20]))
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    assert len(Trainer(lab.config(tmp_path, *TOPK, source, f"data.path={data}")).samples) == 12


@pytest.mark.parametrize("change", ["cut off", "damaged", "description"])
def test_a_store_that_cannot_be_read_is_named_in_one_line(
    lab: Lab, store: Path, tmp_path: Path, change: str
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    part = copy / "part-000000.parquet"
    content = part.read_bytes()
    if change == "cut off":
        part.write_bytes(content[:-1000])
    elif change == "damaged":
        part.write_bytes(content[:100] + bytes(2000) + content[2100:])
    else:
        (copy / "teacher.json").write_text('{"k": 5')
    source = f"teacher={{stored: {copy}, targets: topk, k: 5}}"
    with pytest.raises(ConfigError, match=rf"teacher\.stored: {copy}") as error:
        Trainer(lab.config(tmp_path, *TOPK, source))
    assert ("run cache-teacher again" in str(error.value)) == (change == "cut off")


def test_a_part_that_was_cut_off_is_written_again(lab: Lab, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    part = copy / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-1000])
    store_teacher(lab.config(tmp_path, *TOPK), copy, "float32")
    assert bytes_of(copy) == bytes_of(store)


def test_a_store_is_not_continued_with_other_data_teacher_or_settings(
    lab: Lab, store: Path, tmp_path: Path, tiny_model: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lab.data.read_text().replace("a", "b"))
    other = save_model(tmp_path / "other", tiny_model, hidden_size=32, vocab_size=104)
    before = bytes_of(store)
    for override, message in (
        (f"data.path={data}", "data: other prompts or completions than before"),
        (f"teacher.model={other}", "teacher: other weights than before"),
        ("teacher.k=4", "k: was 5 before, is 4"),
        ("temperature=1", r"temperature: was 1\.5 before, is 1\.0"),
        ("rollouts.max_completion_length=5", "data: other prompts or completions than before"),
    ):
        with pytest.raises(ConfigError, match=f"{store} holds another store: {message}. Choose"):
            store_teacher(lab.config(tmp_path / "run", *TOPK, override), store, "float32")
    assert bytes_of(store) == before


def test_a_store_is_continued_with_the_same_teacher_at_another_place(
    lab: Lab, url: str, store: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(lab.teacher, tmp_path / "teacher")
    before = bytes_of(store)
    for teacher in (f"teacher.model={copy}", f"teacher.url={url}"):
        store_teacher(lab.config(tmp_path / "run", *TOPK, teacher), store, "float32")
    assert bytes_of(store) == before


def test_processes_wait_for_one_that_retries_its_server(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lab.config(tmp_path, "teacher.targets=topk", "teacher.k=4", "teacher.deadline_seconds=20000")
    groups: list[dict[str, Any]] = []

    def group(cpu: bool, **options: Any) -> Any:
        groups.append(options)
        return accelerate.PartialState(cpu, **options)

    monkeypatch.setattr(start, "PartialState", group)
    store_teacher(config, tmp_path / "store", "float32")
    assert groups[0]["timeout"].total_seconds() > 20000


def test_a_teacher_without_a_tokenizer_is_announced(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lab.teacher / name, tmp_path / "teacher")
    teacher = f"teacher={{model: {tmp_path}/teacher, targets: topk, k: 4}}"
    store_teacher(lab.config(tmp_path, teacher), tmp_path / "store", "float32")
    assert f"warning: {tmp_path}/teacher has no tokenizer: the student's is" in capsys.readouterr().out


def test_a_store_of_no_samples_or_from_a_store_is_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "", "completion": "a"}) + "\n")
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    for override, message in (
        (f"data.path={empty}", r"data\.path: no sample can be used of .*1 dropped: empty prompt"),
        (source, r"teacher\.stored: a store is made with teacher\.model or teacher\.url"),
    ):
        with pytest.raises(ConfigError, match=message):
            store_teacher(lab.config(tmp_path, *TOPK, override), tmp_path / "new", "float32")


def test_the_command_needs_no_output_and_no_steps_and_refuses_to_mix_two_stores(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("rollouts: {max_completion_length: 6}")
    command = ["cache-teacher", str(tmp_path / "settings.yaml"), *TOPK]
    command += [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    command += ["--output", str(tmp_path / "store")]
    main(command)
    assert (tmp_path / "store" / "part-000000.parquet").exists()
    with pytest.raises(SystemExit) as end:
        main([*command, "--dtype", "float16"])
    assert end.value.code == 2
    assert (
        "holds another store: dtype: was float32 before, is float16"
        in capsys.readouterr().err.splitlines()[-1]
    )
    with pytest.raises(SystemExit):
        main([*command, f"teacher={{model: {lab.teacher}}}"])
    assert "teacher.targets: must be topk for a store" in capsys.readouterr().err.splitlines()[-1]
