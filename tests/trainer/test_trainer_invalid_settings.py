"""Every key of the settings with values that it must not have."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from fused_distill import cli
from fused_distill.shortened import shortened
from fused_distill.trainer.config import ConfigError, TrainConfig, load_config
from pydantic import BaseModel
from pydantic.fields import FieldInfo

REQUIRED: dict[str, Any] = {"student": "s", "data": {"path": "d"}, "output": "o", "steps": 1}
SEVERAL = {"teachers": {"math": {"url": "http://x"}}}
ONE = {"teacher": {"url": "http://x"}}


def settings(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield all keys; those of a section inside a mapping have its name "math"."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        by_name = get_origin(field.annotation) is dict
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from settings(part, f"{prefix}{name}.math." if by_name else f"{prefix}{name}.")


def members(annotation: Any) -> list[Any]:
    """Return the types that a setting may have."""
    if get_origin(annotation) in (types.UnionType, Union):
        return [member for part in get_args(annotation) for member in members(part)]
    if hasattr(annotation, "__metadata__"):
        return members(annotation.__origin__)
    return [annotation]


def wrong_values(field: FieldInfo) -> Iterator[Any]:
    """Yield values of other types, outside the bounds, not finite, empty or no choice of a setting."""
    kinds = members(field.annotation)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    mapping = bool(sections) or any(get_origin(kind) is dict for kind in kinds)
    yield from ([[1]], [{}], *(() if mapping else ({"a": {"b": 1}},)))
    if bool not in kinds:
        yield from (True, False)
    if type(None) not in kinds:
        yield None
    if mapping:
        yield from (3, "text", 1.5)
    if int in kinds or float in kinds:
        yield from ("many", "", math.nan, -math.inf)
        for bound in field.metadata:
            for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                if hasattr(bound, name):
                    yield getattr(bound, name) + step
        unlimited = any(getattr(bound, "allow_inf_nan", False) for bound in field.metadata)
        if not unlimited:
            yield math.inf
    if int in kinds:
        yield from (1.5, -1, -(10**400))
    if bool in kinds:
        yield from ("maybe", 7, "")
    if str in kinds or Path in kinds:
        yield from (3, 1.5, "")
    if list in [get_origin(kind) for kind in kinds]:
        yield from ([3], [""], [None])
        if str not in kinds:
            yield "text"
    if any(get_origin(kind) is Literal for kind in kinds):
        yield from ("wavy", 7, 1.5)


CASES = [(key, value) for key, field in settings() for value in wrong_values(field)]


def config_with(key: str, value: Any) -> dict[str, Any]:
    """Return settings with one of them changed."""
    content = yaml.safe_load(yaml.safe_dump({**REQUIRED, **(SEVERAL if "math" in key else ONE)}))
    *names, last = key.split(".")
    section = content
    for name in names:
        section = section.setdefault(name, {})
    section[last] = value
    return content


def error_of(tmp_path: Path, content: dict[str, Any]) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    try:
        load_config(tmp_path / "run.yaml")
    except ConfigError as error:
        return str(error)
    pytest.fail(f"{content} is accepted")


def test_the_walk_has_every_section() -> None:
    keys = {key for key, _ in CASES}
    assert {"steps", "teacher.url", "teachers.math.k", "lora.r", "token_weight.top_fraction"} <= keys
    assert len(CASES) > 500


@pytest.mark.parametrize("key", sorted({key for key, _ in CASES}))
def test_a_wrong_value_is_named_with_its_key_and_quoted(tmp_path: Path, key: str) -> None:
    for _, value in (case for case in CASES if case[0] == key):
        message = error_of(tmp_path, config_with(key, value))
        problems = [text for text in message.split("; ") if re.match(rf"{re.escape(key)}(\.\w+)*: ", text)]
        assert problems, (value, message)
        wrong = value[0] if isinstance(value, list) and len(value) == 1 else value
        quotes = {f"got {shortened(value)}", f"got {shortened(wrong)}"}
        assert any(text.endswith(tuple(quotes)) for text in problems) or isinstance(value, dict), (
            value,
            message,
        )


@pytest.mark.parametrize("key", [key for key, _ in settings()])
def test_an_unknown_key_beside_each_is_named(tmp_path: Path, key: str) -> None:
    message = error_of(tmp_path, config_with(f"{key}z", 3))
    assert message == f"{key}z is no setting; did you mean {key}?"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lambda", "lambda is no setting; did you mean lmbda?"),
        ("num_generations", "num_generations is no setting; did you mean rollouts.num_generations?"),
        ("rollouts.beta", "rollouts.beta is no setting; did you mean beta?"),
        ("lora.rank", "lora.rank is no setting; lora has r, alpha, target_modules, merge"),
        ("epochs", "epochs is no setting; fused-distill train --help lists all of them"),
    ],
)
def test_an_unknown_setting_is_told_what_may_be_meant(tmp_path: Path, key: str, message: str) -> None:
    assert error_of(tmp_path, config_with(key, 3)) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher", "gpt2", "teacher: must have settings of its own, e.g. {model: ...}, got 'gpt2'"),
        ("data", "a.jsonl", "data: must have settings of its own, e.g. {path: ...}, got 'a.jsonl'"),
        ("lora", True, "lora: must have settings of its own, e.g. {r: ...}, got True"),
        ("teachers.math", "x", "teachers.math: must have settings of its own, e.g. {model: ...}, got 'x'"),
        ("frozen", "embed", "frozen: must be a list, e.g. [embed], got 'embed'"),
        ("trackers", "wandb", "trackers: must be a list, e.g. [wandb], got 'wandb'"),
        ("teacher.load", "x", "teacher.load: must be a mapping, e.g. {name: ...}, got 'x'"),
    ],
)
def test_a_value_in_place_of_settings_or_a_list_is_told_their_form(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    assert error_of(tmp_path, config_with(key, value)) == message


@pytest.mark.parametrize("command", ["train", "check", "cache-teacher"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=.inf", "learning_rate: Input should be a finite number, got inf"),
        ("steps=true", "steps: Input should not be true or false, got True"),
        (
            "teacher.url=[3]",
            "teacher.url: Input should be a text or a list of texts, none of them empty, got [3]",
        ),
        ("teacher.url={a: 'http://user:secret@x'}", "got {'a': 'http://x'}"),
        ("output=", "output: Input is not a valid path"),
        ("=3", "an override must be KEY=VALUE, got '=3'"),
    ],
)
def test_commands_end_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, override: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**REQUIRED, **ONE}))
    store = ["--output", str(tmp_path / "store")] if command == "cache-teacher" else []
    with pytest.raises(SystemExit) as end:
        cli.main([command, str(tmp_path / "run.yaml"), override, *store])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"fused-distill {command}: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"steps: \xff")
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text: invalid start byte at byte 7"):
        load_config(tmp_path / "run.yaml")
