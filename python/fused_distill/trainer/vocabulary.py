"""Which token ids mean the same to student and teacher, and whether the data holds others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from ..huggingface.loading import find_tokenizer, read_tokenizer, tokenizer_fingerprint
from .config import ConfigError, TeacherConfig
from .data import Data, Sample
from .targets import Teacher

pc: Any = pyarrow.compute
_NAMED = 5  # an error message names so many tokens


class Comparison(NamedTuple):
    """The tokens of two tokenizers, among them added and special ones."""

    moved: list[tuple[str, int, int]]  # tokens known to both under two ids: token, first's id, second's
    same: int  # number of tokens with the same id in both
    end: int | None  # the first id behind all of these that has a token in one of the two
    renamed: list[tuple[int, str | None, str | None]]  # ids before it with two tokens, or with one in one
    smaller: int  # number of tokens of the smaller of the two


def compare_vocabularies(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> Comparison:
    """Compare two tokenizers token by token.

    Only the vocabularies count. Models get ids, never texts, so merges, normalizers and templates may differ.
    What can go wrong nevertheless: where the teacher's merges would split a text otherwise, the teacher sees
    tokens in an order that is unusual for it, and gives them lower probabilities. A reserved token that one
    of the two has renamed, e.g. <unused0>, counts as the same token if tokens behind it are the same.
    """
    own, other = _tokens_of(first), _tokens_of(second)
    moved = [(t, own[t], other[t]) for t in own.keys() & other.keys() if own[t] != other[t]]
    equal, unequal = own.items() & other.items(), {i for _, i in own.items() ^ other.items()}
    last = max((i for _, i in equal), default=-1)
    end = min((i for i in unequal if i > last), default=None)
    names = [{i: t for t, i in vocabulary.items() if i in unequal} for vocabulary in (own, other)]
    renamed = [(i, names[0].get(i), names[1].get(i)) for i in sorted(unequal) if i < last]
    return Comparison(
        sorted(moved, key=lambda token: token[1]), len(equal), end, renamed, min(len(own), len(other))
    )


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {**tokenizer.get_vocab(), **{str(token): i for i, token in added.items()}}


def common_tokens(
    settings: TeacherConfig, student: PreTrainedTokenizerBase, rows: int, fingerprint: str | None = None
) -> int:
    """Return the number of tokens, from the first, that student and teacher have in common.

    Equal tokenizers have all `rows` in common, also those without a token. A teacher whose tokenizer is not
    known, as that of a stock vLLM server, is assumed to have the student's.

    Args:
        settings: of the teacher.
        student: its tokenizer.
        rows: of the LM heads that both have.
        fingerprint: of the tokenizer of a server or a store, if it tells it.

    Raises:
        ConfigError: tokens have other ids, or the teacher's tokenizer is needed to know it.
    """
    key = "teacher.tokenizer" if settings.tokenizer else f"teacher.{settings.source}"
    if fingerprint == tokenizer_fingerprint(student):
        return rows
    teacher = _teacher_tokenizer(settings)
    if teacher is None:
        if fingerprint is None:
            return rows
        raise ConfigError(
            f"{key}: the teacher's tokenizer is not the student's. Set teacher.tokenizer to its path or "
            "name, so that their tokens can be compared"
        )
    own = tokenizer_fingerprint(teacher)
    if settings.url is not None and fingerprint not in (None, own):
        raise ConfigError(f"{key}: {settings.tokenizer} is not the tokenizer of the server's model")
    if own == tokenizer_fingerprint(student):
        return rows
    found = compare_vocabularies(student, teacher)
    if found.moved:
        raise ConfigError(
            f"{key}: the teacher's tokenizer gives tokens other ids than the student's: {_told(found.moved)}"
            ". Distributions are compared id by id, so tokens that both models know must have the same id"
        )
    if 2 * found.same < found.smaller:
        raise ConfigError(
            f"{key}: the tokenizers of teacher and student have only {found.same} tokens in common"
        )
    return rows if found.end is None else min(rows, found.end)


def _teacher_tokenizer(settings: TeacherConfig) -> PreTrainedTokenizerBase | None:
    if settings.tokenizer is None:
        return None if settings.tokenizer_name is None else find_tokenizer(settings.tokenizer_name)
    try:
        return read_tokenizer(settings.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.tokenizer: {settings.tokenizer} cannot be loaded: {error}") from error


def _told(moved: list[tuple[str, int, int]]) -> str:
    named = ", ".join(
        f"{token!r} is {own} ({other} in the teacher's)" for token, own, other in moved[:_NAMED]
    )
    return named + (f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else "")


def check_tokens(
    teachers: Mapping[str, Teacher], data: Data, tokenizer: PreTrainedTokenizerBase, completions: bool
) -> None:
    """Raise a ConfigError if the data has a token that student and teacher do not have in common.

    Args:
        teachers: by name.
        data: of which a teacher sees its own prompts, if it has any.
        tokenizer: of the student.
        completions: whether the data's completions are used.
    """
    columns = ("prompt", "teacher_prompt", *(["completion"] if completions else []))
    table: Any = data.samples.data  # a quick look, also at samples that were dropped
    chunks = [chunk for name in columns for chunk in table.column(name).chunks]
    largest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in chunks), default=0)
    if largest < min(teacher.vocab_size for teacher in teachers.values()):
        return
    for i in range(len(data.samples)):
        sample = Sample(**data.samples[i])
        size = teachers[sample.teacher].vocab_size
        seen = sample.for_teacher()
        for name, tokens in (("prompt", seen.prompt), ("completion", seen.completion if completions else [])):
            unknown = next((token for token in tokens if token >= size), None)
            if unknown is not None:
                teacher = f"teacher {sample.teacher}".rstrip()
                raise ConfigError(
                    f"data.path: {data.source}: row {sample.row}: its {name} has the token "
                    f"{tokenizer.decode([unknown])!r} ({unknown}), but student and {teacher} have only the "
                    f"ids below {size} in common"
                )
