"""Comparison of the chat formats of student and teacher: templates and end-of-turn tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...huggingface.loading import read_tokenizer
from ...shortened import shortened
from ..vocabulary import compare_vocabularies
from .finding import Finding, ok, one_line, warning
from .teacher_of_run import TeacherOfRun

if TYPE_CHECKING:
    from ..loop import Trainer

_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Xanadu"}]


def compare_chats(run: Trainer, teacher: TeacherOfRun) -> Finding | None:
    """Compare how student and teacher render a conversation, and the tokens that end an answer.

    Returns None if the teacher's tokenizer is not known, as a server's.
    """
    settings = teacher.settings
    if settings.tokenizer_name is None:
        return None
    own: Any = run.tokenizer
    other, absent = own, None
    try:
        other = read_tokenizer(settings.tokenizer_name)
    except (OSError, ValueError) as error:
        absent = (
            "the teacher has no tokenizer that can be loaded, so the student's is assumed. Set "
            f"teacher.tokenizer to the teacher's, so that they can be compared ({one_line(error)})."
        )
    problems = [
        absent,
        _tokens(own, other),
        _templates(own, other, settings.chat_template == "own"),
        _ends(run, own, other, teacher),
    ]
    found = " ".join(problem for problem in problems if problem)
    if found:
        return warning(found)
    end = own.eos_token
    if own.chat_template is None and other.chat_template is None:
        return ok(f"neither model has a chat template; texts end with {end!r}")
    return ok(f"the chat templates render alike; texts end with {end!r}")


def _tokens(own: Any, other: Any) -> str | None:
    """Name ids that are one token to the losses, but not to the tokenizers."""
    found = [] if own is other else compare_vocabularies(own, other).renamed
    if not found:
        return None
    i, first, second = found[0]
    return (
        f"{len(found)} ids have other tokens in the teacher's tokenizer, e.g. {i}: {second!r} instead of "
        f"{first!r}. The losses compare them as one token, which is right for renamed reserved tokens."
    )


def _templates(own: Any, other: Any, rendered_by_own: bool) -> str | None:
    if rendered_by_own or own.chat_template == other.chat_template:
        return None
    if own.chat_template is None:
        return "the student has no chat template, but the teacher has: messages in the data cannot be used."
    if other.chat_template is None:
        return (
            "the teacher has no chat template, but the student has: if it is a base model, it has not learnt "
            "to answer messages. Give texts as prompts, or use the teacher's instruction-tuned version."
        )
    renderings = [_render(tokenizer) for tokenizer in (own, other)]
    if renderings[0] == renderings[1]:
        return None
    texts = " and ".join(shortened(text) for text in renderings)
    return (
        f"the chat templates of student and teacher render a conversation as {texts}. The teacher sees the "
        "student's format; teacher.chat_template: own renders its prompts in its own."
    )


def _ends(run: Trainer, own: Any, other: Any, teacher: TeacherOfRun) -> str | None:
    """Compare the tokens at which generation stops with the one that ends an answer in the template."""
    ends: Any = run.model.generation_config.eos_token_id if run.model.generation_config else None
    stops = {*([ends] if isinstance(ends, int) else ends or [own.eos_token_id])} - {None}
    told = ", ".join(repr(own.decode([stop])) for stop in sorted(stops))
    if stops and min(stops) >= teacher.teacher.vocab_size:
        return (
            f"generation stops at {told}, which the teacher does not know and which is therefore never "
            "sampled: every completion runs on to rollouts.max_completion_length. Set eos_token_id in the "
            "student's generation_config.json to a token that both know."
        )
    turn_end = _turn_end(own)
    if turn_end is not None and stops and turn_end not in stops:
        return (
            f"an answer ends with {own.decode([turn_end])!r} in the student's chat template, but generation "
            f"stops at {told}: completions may run on to rollouts.max_completion_length. Add {turn_end} to "
            "eos_token_id in the student's generation_config.json."
        )
    if own.chat_template is None and own.eos_token_id != other.eos_token_id:
        return (
            f"the student's texts end with {own.eos_token!r}, the teacher's with {other.eos_token!r}: the "
            "teacher gives little probability to the student's end. Set eos_token of the student's tokenizer "
            "to the teacher's."
        )
    return None


def _turn_end(tokenizer: Any) -> int | None:
    """Return the last special token of a rendered answer, None if there is none."""
    text = _render(tokenizer) if tokenizer.chat_template is not None else None
    if text is None:
        return None
    answer = text[text.rfind(_CHAT[-1]["content"]) :]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in tokenizer(answer, add_special_tokens=False)["input_ids"] if i in special]
    return ids[0] if ids else None


def _render(tokenizer: Any) -> str | None:
    """Return a rendered conversation, None if the template needs other messages."""
    try:
        return str(tokenizer.apply_chat_template(_CHAT, tokenize=False))
    except Exception:  # templates raise many types
        return None
