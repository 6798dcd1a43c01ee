"""Tests of teachers whose tokenizer is not the student's: which are refused, and which tokens are common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.loop import Trainer
from fused_distill.trainer.preflight import preflight
from fused_distill.trainer.teachers import common_vocabulary
from fused_distill.trainer.vocabulary import compare_vocabularies
from serving_cases import serving
from trainer_cases import NOT_INTERPRETED, Lab, save_model, transformers
from trainer_cases import lab as lab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytestmark = NOT_INTERPRETED


def tokenizer_of(*tokens: str, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens have the ids 0, 1, ..., followed by added ones."""
    from tokenizers import Tokenizer, models

    whole = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=whole)
    tokenizer.add_tokens([*added])
    return tokenizer


@pytest.mark.parametrize(
    ("student", "teacher", "end", "renamed"),
    [
        (tokenizer_of("a", "b"), tokenizer_of("a", "b"), None, []),
        (tokenizer_of("a", "b", added=("x",)), tokenizer_of("a", "b"), 2, []),
        (tokenizer_of("a", "b"), tokenizer_of("a", "b", added=("x",)), 2, []),
        (tokenizer_of("a", "b", added=("x", "y")), tokenizer_of("a", "b", added=("x", "z")), 3, []),
        (tokenizer_of("a", "u", "c"), tokenizer_of("a", "v", "c"), None, [(1, "u", "v")]),
        (tokenizer_of("a", "u", "c", "d"), tokenizer_of("a", "v", "c"), 3, [(1, "u", "v")]),
    ],
    ids=["equal", "more_student", "more_teacher", "other_added", "renamed", "renamed_and_more"],
)
def test_common_tokens_end_behind_the_last_token_that_both_know(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    end: int | None,
    renamed: list[tuple[int, str, str]],
) -> None:
    found = compare_vocabularies(student, teacher)
    assert (found.moved, found.end, found.renamed) == ([], end, renamed)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (tokenizer_of("a", "b", "c"), tokenizer_of("a", "c", "b")),
        (tokenizer_of("a", "b", added=("c",)), tokenizer_of("a", "c", added=("b",))),
    ],
)
def test_tokens_with_two_ids_are_named_with_both(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    assert compare_vocabularies(student, teacher).moved == [("b", 1, 2), ("c", 2, 1)]


@pytest.fixture(scope="module")
def with_tokens(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a model with 104 rows whose tokenizer has further tokens behind the 98."""

    def save(*tokens: str, **changes: int) -> Path:
        path = save_model(tmp_path_factory.mktemp("model"), lab.student, vocab_size=104, **changes)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens([*tokens])
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def swapped(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the teacher whose tokenizer has the ids of two characters exchanged."""
    path = Path(shutil.copytree(lab.teacher, tmp_path_factory.mktemp("swapped") / "teacher"))
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


MOVED = r"gives tokens other ids than the student's: 'a' is 68 \(69 in the teacher's\), 'b' is 69 \(68 in "


def test_a_teacher_that_gives_tokens_other_ids_is_refused(lab: Lab, swapped: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^teacher\.model: the teacher's tokenizer {MOVED}"):
        Trainer(lab.config(tmp_path, f"teacher.model={swapped}"))
    with pytest.raises(ConfigError, match=rf"^teacher\.tokenizer: the teacher's tokenizer {MOVED}"):
        Trainer(lab.config(tmp_path, f"teacher.tokenizer={swapped}"))


def test_a_teacher_with_hardly_a_token_in_common_is_refused(lab: Lab, tmp_path: Path) -> None:
    tokenizer_of("<pad>", *(f"token{i}" for i in range(9))).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"^teacher\.tokenizer: .* have only 1 tokens in common"):
        Trainer(lab.config(tmp_path, f"teacher.tokenizer={tmp_path}/other"))


def test_tokens_of_the_student_alone_are_neither_sampled_nor_compared(
    lab: Lab, with_tokens: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = f"teacher.model={with_tokens(hidden_size=24)}"
    trainer = Trainer(lab.config(tmp_path / "more", f"student={with_tokens('<x>', '<y>')}", teacher))
    assert common_vocabulary(trainer.teachers) == trainer.rollouts.sampling(1, 0).vocab_size == 98
    [samples] = trainer.fill_buffer()
    assert max(token for s in samples for token in s.completion) < 98
    equal = Trainer(
        lab.config(tmp_path / "equal", f"student={with_tokens('<x>')}", f"teacher.model={with_tokens('<x>')}")
    )
    assert common_vocabulary(equal.teachers) == 104


def test_a_student_with_more_rows_than_a_local_teacher_trains_on_the_common_ones(
    lab: Lab, tmp_path: Path
) -> None:
    wide = save_model(tmp_path / "wide", lab.student, vocab_size=110)
    trainer = Trainer(lab.config(tmp_path, f"student={wide}"))
    assert trainer.rollouts.sampling(1, 0).vocab_size == 104
    [samples] = trainer.fill_buffer()
    assert max(token for s in samples for token in s.completion) < 104
    assert trainer.update([samples])["loss"] > 0


@pytest.mark.parametrize("column", ["prompt", "completion", "teacher_prompt"])
def test_data_with_a_token_that_the_teacher_does_not_know_names_its_row(
    lab: Lab, with_tokens: Callable[..., Path], tmp_path: Path, column: str
) -> None:
    rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
    rows[5][column] = "ab<y>"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"student={with_tokens('<x>', '<y>')}", f"teacher.model={lab.teacher}", f"data.path={data}"]
    what = "prompt" if "prompt" in column else column
    message = (
        rf"^data\.path: .*: row 5: its {what} has the token '<y>' \(99\), but .* the ids below 98 in common"
    )
    with pytest.raises(ConfigError, match=message):
        Trainer(lab.config(tmp_path, *settings, "lmbda=0"))
    topk = lab.config(tmp_path, *settings, "teacher.targets=topk", "teacher.k=5", "lmbda=0")
    with pytest.raises(ConfigError, match=message):
        store_teacher(topk, tmp_path / "store", "float32")
    if column == "completion":
        Trainer(lab.config(tmp_path, *settings))  # does not use it


def test_a_served_or_stored_teacher_with_another_tokenizer_needs_it_for_the_comparison(
    lab: Lab, with_tokens: Callable[..., Path], swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = with_tokens("<x>", hidden_size=24)
    topk = ("teacher.targets=topk", "teacher.k=5", "lmbda=0")
    like = f"student={teacher}"  # the store is made for a student with the teacher's tokenizer
    store_teacher(
        lab.config(tmp_path, *topk, like, f"teacher.model={teacher}"), tmp_path / "store", "float32"
    )
    with serving(TransformersEngine.load(str(teacher), "cpu", "float32")) as served:
        sources = {"url": f"url: {served.url}", "stored": f"stored: {tmp_path}/store"}
        for key, source in sources.items():
            settings = f"{source}, targets: topk, k: 5"
            with pytest.raises(ConfigError, match=rf"^teacher\.{key}: .* Set teacher\.tokenizer to its path"):
                Trainer(lab.config(tmp_path / key, f"teacher={{{settings}}}", "lmbda=0"))
            with pytest.raises(ConfigError, match=r"^teacher\.tokenizer: /nowhere cannot be loaded"):
                Trainer(lab.config(tmp_path / key, f"teacher={{{settings}, tokenizer: /nowhere}}", "lmbda=0"))
            run = Trainer(
                lab.config(tmp_path / key, f"teacher={{{settings}, tokenizer: {teacher}}}", "lmbda=0")
            )
            assert common_vocabulary(run.teachers) == 98
            assert isfinite(run.update(run.fill_buffer())["loss"])
        wrong = f"teacher={{{sources['url']}, targets: topk, k: 5, tokenizer: {swapped}}}"
        with pytest.raises(
            ConfigError, match=r"^teacher\.tokenizer: .* is not the tokenizer of the server's"
        ):
            Trainer(lab.config(tmp_path, wrong, "lmbda=0"))


def test_the_checks_name_renamed_tokens_and_an_end_that_is_never_sampled(
    lab: Lab, with_tokens: Callable[..., Path], tmp_path: Path
) -> None:
    def chats(student: Path, teacher: Path) -> str:
        run = Trainer(lab.config(tmp_path / "run", f"student={student}", f"teacher.model={teacher}"))
        return next(f.text for f in preflight(run) if f.name == "teacher's chat format")

    renamed = chats(with_tokens("<x>", "<z>"), with_tokens("<y>", "<z>"))
    assert renamed.startswith("1 ids have other tokens in the teacher's tokenizer, e.g. 98: '<y>' instead of")
    student = with_tokens("<x>")
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = 98
    model.save_pretrained(student)
    assert chats(student, lab.teacher).startswith(
        "generation stops at '<x>', which the teacher does not know"
    )
