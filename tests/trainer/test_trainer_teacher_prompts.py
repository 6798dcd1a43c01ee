"""Tests of prompts that only the teacher sees, and of the chat template that renders them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Batch, Sample, load_data
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.preflight import preflight
from plain_loop import BETAS, assert_equals_plain_steps
from serving_cases import serving
from trainer_cases import NOT_INTERPRETED, Lab, losses, transformers, write_rows
from trainer_cases import lab as lab
from trainer_cases import prompts as prompts

pytestmark = NOT_INTERPRETED

TEMPLATE = (
    "{% for m in messages %}NAME{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}NAMEa:{% endif %}"
)


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with serving(TransformersEngine.load(str(lab.teacher), "cpu", "float32")) as served:
        yield served.url


def with_template(source: Path, path: Path, template: str) -> Path:
    """Save a copy of a model whose tokenizer has a chat template."""
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@BETAS
def test_ten_steps_with_teacher_prompts_equal_a_plain_pytorch_loop(
    lab: Lab, prompts: Path, tmp_path: Path, beta: float
) -> None:
    settings = (f"data.path={prompts}", f"beta={beta}", "lmbda=0", "steps=10", "learning_rate=0.001")
    trainer = Trainer(lab.config(tmp_path, *settings))
    assert any(sample["teacher_prompt"] for sample in trainer.samples.to_list())
    assert_equals_plain_steps(trainer, beta, 10)


def test_served_and_stored_teachers_see_the_prompts_that_a_local_one_sees(
    lab: Lab, prompts: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = (f"data.path={prompts}", "lmbda=0")
    topk = (*settings, "teacher.targets=topk", "teacher.k=5")
    store_teacher(lab.config(tmp_path / "store", *topk), tmp_path / "store" / "folder", "float32")
    runs = {
        "local": settings,
        "hidden": (*settings, f"teacher.url={url}"),
        "local_topk": topk,
        "served_topk": (*topk, f"teacher.url={url}"),
        "stored": (*settings, f"teacher={{stored: {tmp_path}/store/folder, targets: topk, k: 5}}"),
        "without": (f"data.path={lab.data}", "lmbda=0"),
    }
    for name, options in runs.items():
        train(lab.config(tmp_path / name, *options))
    got = {name: losses(tmp_path / name) for name in runs}
    assert got["hidden"] == pytest.approx(got["local"], rel=1e-5)
    assert got["served_topk"] == pytest.approx(got["local_topk"], rel=1e-4)
    assert got["stored"] == pytest.approx(got["local_topk"], rel=1e-4)
    assert got["without"] != pytest.approx(got["local"], rel=1e-2)


def test_a_store_without_the_teachers_prompts_is_not_used_for_them(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    topk = ("lmbda=0", "teacher.targets=topk", "teacher.k=5")
    store_teacher(lab.config(tmp_path, *topk), tmp_path / "store", "float32")
    source = f"teacher={{stored: {tmp_path}/store, targets: topk, k: 5}}"
    with pytest.raises(ConfigError, match=r"teacher\.stored: .* lacks the completions of 26 of 40 samples"):
        train(lab.config(tmp_path, "lmbda=0", source, f"data.path={prompts}"))


def test_completions_of_the_student_follow_the_teachers_prompt(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    trainer = Trainer(lab.config(tmp_path, f"data.path={prompts}", "rollouts.num_generations=2"))
    [samples] = trainer.fill_buffer()
    by_row = {row["row"]: row for row in trainer.samples.to_list()}
    assert {s.teacher_prompt is None for s in samples} == {True, False}
    for s in samples:
        assert (s.prompt, s.teacher_prompt) == (by_row[s.row]["prompt"], by_row[s.row]["teacher_prompt"])


def test_the_teachers_batch_has_its_own_valid_positions() -> None:
    batch = Batch.collate(
        [Sample(0, [5], [6, 7], teacher_prompt=[1, 2, 3]), Sample(1, [8, 9], [4])], torch.device("cpu")
    )
    seen = batch.for_teacher()
    assert seen.tokens.tolist() == [[1, 2, 3, 6, 7], [8, 9, 4, 0, 0]]
    assert seen.valid.tolist() == [2, 3, 6]
    assert batch.valid.tolist() == [0, 1, 4]
    assert seen.for_teacher().tokens.tolist() == seen.tokens.tolist()


def test_the_check_of_equal_weights_compares_them_after_the_same_prompt(
    lab: Lab, prompts: Path, tmp_path: Path
) -> None:
    trainer = Trainer(lab.config(tmp_path, f"data.path={prompts}", f"teacher.model={lab.student}"))
    trainer.samples = trainer.samples.filter(lambda row: row["teacher_prompt"] is not None)
    loss = next(finding for finding in preflight(trainer) if finding.name == "teacher's loss")
    assert loss.level == "ok"
    assert loss.text.endswith("the teacher has the student's weights, and prompts of its own")
    assert float(loss.text.split()[0]) == pytest.approx(0, abs=1e-4)


CHAT = [{"role": "user", "content": "hi"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "yo"}]


def template(name: str) -> str:
    return TEMPLATE.replace("NAME", name)


def teacher_text(
    lab: Lab, tmp_path: Path, row: dict[str, Any], *overrides: str
) -> tuple[str, str | None, str]:
    """Return the texts of prompt, teacher's prompt and completion of a row."""
    student = with_template(lab.student, tmp_path / "student", template("S"))
    teacher = with_template(lab.teacher, tmp_path / "teacher", template("T"))
    data = write_rows(tmp_path / "data.jsonl", [row])
    paths = [f"student={student}", f"teacher.model={teacher}", f"data.path={data}"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    [sample] = load_data(
        lab.config(tmp_path, *paths, *overrides), tokenizer, completions=False
    ).samples.to_list()
    texts = (
        None if sample[name] is None else "".join(tokenizer.convert_ids_to_tokens(sample[name]))
        for name in ("prompt", "teacher_prompt", "completion")
    )
    return tuple(texts)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("row", "whose", "expected"),
    [
        ({"messages": ANSWERED}, "student", None),
        ({"messages": ANSWERED}, "own", "Tu:hi;Ta:"),
        ({"messages": CHAT}, "own", "Tu:hi;Ta:"),
        ({"prompt": CHAT, "teacher_prompt": [{"role": "user", "content": "cheat"}]}, "own", "Tu:cheat;Ta:"),
        ({"messages": ANSWERED, "teacher_messages": CHAT}, "student", "Su:hi;Sa:"),
        ({"messages": ANSWERED, "teacher_messages": CHAT}, "own", "Tu:hi;Ta:"),
        ({"messages": ANSWERED, "teacher_prompt": "plain text"}, "own", "plain text"),
        ({"prompt": "one", "completion": "two", "teacher_messages": CHAT}, "student", "Su:hi;Sa:"),
        ({"prompt": "one", "completion": "two"}, "own", None),
    ],
)
def test_the_template_of_the_settings_renders_the_teachers_messages(
    lab: Lab, tmp_path: Path, row: dict[str, Any], whose: str, expected: str | None
) -> None:
    prompt, teacher_prompt, completion = teacher_text(lab, tmp_path, row, f"teacher.chat_template={whose}")
    assert teacher_prompt == expected
    assert prompt == ("one" if row.get("prompt") == "one" else "Su:hi;Sa:")
    assert completion.rstrip(";") in ("", "yo", "two<eos>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "teacher_prompt": "b", "teacher_messages": CHAT},
            "only one of the columns teacher_prompt, ",
        ),
        (
            {"prompt": "a", "teacher_prompt": 3},
            "column teacher_prompt: must be text or a list of messages, got 3",
        ),
        ({"prompt": "a", "teacher_messages": "b"}, "column teacher_messages: must be a list, or one as JSON"),
        (
            {"prompt": "a", "teacher_messages": ANSWERED},
            "column teacher_messages: must end before the assistant",
        ),
        (
            {"messages": [*ANSWERED, *ANSWERED], "teacher_prompt": "b"},
            "column teacher_prompt: needs one turn per row, got 2",
        ),
    ],
)
def test_a_row_whose_teacher_prompt_cannot_be_used_is_named(
    lab: Lab, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        teacher_text(lab, tmp_path, row, "data.train_on=all_turns")
    assert "data.jsonl: row 0: " in str(error.value)
    assert message in str(error.value)


def test_a_prompt_of_the_teacher_that_is_too_long_is_dropped_with_the_reason(
    lab: Lab, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "teacher_prompt": "b" * n} for n in (3, 4)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    config = lab.config(tmp_path, f"data.path={data}", "data.max_prompt_length=3")
    read = load_data(config, transformers.AutoTokenizer.from_pretrained(lab.student), completions=False)
    assert read.dropped == {"prompt longer than 3 tokens (data.max_prompt_length)": 1}
    assert len(read.samples) == 1


def test_a_template_that_is_not_there_is_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher: chat_template own needs tokenizer with url"):
        lab.config(tmp_path, "teacher.url=http://x", "teacher.chat_template=own")
    config = lab.config(tmp_path, "teacher.chat_template=own")
    with pytest.raises(ConfigError, match=r"teacher\.chat_template: must be student, as .* has none"):
        load_data(config, transformers.AutoTokenizer.from_pretrained(lab.student), completions=False)
