"""Prompts and completions of a row of data as token ids: plain text, TRL's and ShareGPT's conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import eq
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..shortened import shortened
from .config import DataConfig

# ShareGPT's names of the speakers.
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
CONVERSATIONS = ("messages", "conversations")
_SOURCES = ("prompt", *CONVERSATIONS)
_TEACHER_COLUMNS = ("teacher_prompt", "teacher_messages")


class RowError(ValueError):
    """A row cannot be used; the message names the column and quotes the value."""


class Turn(NamedTuple):
    """A prompt, and the completion that follows it if there is one."""

    prompt: list[int]
    completion: list[int] | None
    teacher_prompt: list[int] | None = None  # None: the teacher sees the prompt


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Turn]:
    """Return the turns of a row to train on.

    Args:
        row: exactly one of `prompt` (text, or a list of messages), `messages` and `conversations`. A
            conversation's completion is in the column `completion`, or it is the last message if this is
            the assistant's. `tools` lists JSON schemas for the chat template. The teacher sees another prompt
            if the row has `teacher_prompt` (text, or a list of messages) or `teacher_messages`.
        tokenizer: of the student.
        config: `train_on: all_turns` returns one turn for every message of the assistant, whose prompt is the
            conversation before it.
        teacher_tokenizer: its chat template renders messages for the teacher. None: the student's does.

    Raises:
        RowError: the row has none of the formats above (the message names the column and quotes the value).
    """
    sources = [name for name in _SOURCES if row.get(name) is not None]
    if len(sources) != 1:
        found = ", ".join(sources or row)
        raise RowError(f"must have exactly one of the columns {', '.join(_SOURCES)}, got {found}")
    [source] = sources
    value, completion = row[source], row.get("completion")
    if source == "prompt" and isinstance(value, str):
        if not isinstance(completion, str | None):
            raise RowError(f"column completion: must be text, as the prompt is, got {shortened(completion)}")
        turns = [_tokenize_text(value, completion, tokenizer)]
        return _with_teacher_prompt(row, turns, tokenizer, config, teacher_tokenizer)
    messages = _read_messages(source, value)
    answered = messages[-1]["role"] == "assistant"
    if completion is not None:
        if answered:
            raise RowError(f"column completion: must be empty if {source} ends with the assistant's message")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        messages += _read_messages("completion", completion)
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"column completion: must end with a message of the assistant, got {messages[-1]['role']}"
            )
    last = len(messages) - 1
    ends = [
        i + 1
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (i == last or config.train_on == "all_turns")
    ]
    if messages[-1]["role"] != "assistant":
        ends.append(len(messages))
    chat = _Chat.of_row(row, tokenizer, config)
    turns = [chat.tokenize(messages[:end]) for end in ends]
    if teacher_tokenizer is not None:
        own = _Chat.of_row(row, teacher_tokenizer, config)
        prompts = [own.tokenize(messages[:end]).prompt for end in ends]
        turns = [turn._replace(teacher_prompt=prompt) for turn, prompt in zip(turns, prompts, strict=True)]
    return _with_teacher_prompt(row, turns, tokenizer, config, teacher_tokenizer)


def _with_teacher_prompt(
    row: Mapping[str, Any],
    turns: list[Turn],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> list[Turn]:
    """Return the turns with the prompt that the row has for the teacher, if it has one."""
    columns = [name for name in _TEACHER_COLUMNS if row.get(name) is not None]
    if not columns:
        return turns
    if len(columns) > 1:
        raise RowError(f"must have only one of the columns {', '.join(columns)}")
    [column] = columns
    if len(turns) != 1:
        raise RowError(f"column {column}: needs one turn per row, got {len(turns)} (data.train_on)")
    if column == "teacher_prompt" and isinstance(row[column], str):
        prompt = _tokenize_text(row[column], None, teacher_tokenizer or tokenizer).prompt
    else:
        messages = _read_messages(column, row[column])
        if messages[-1]["role"] == "assistant":
            raise RowError(f"column {column}: must end before the assistant's answer, the completion")
        prompt = _Chat.of_row(row, teacher_tokenizer or tokenizer, config).tokenize(messages).prompt
    return [turns[0]._replace(teacher_prompt=prompt)]


def _tokenize_text(prompt: str, completion: str | None, tokenizer: PreTrainedTokenizerBase) -> Turn:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    has_bos = isinstance(bos, str) and prompt.startswith(bos)
    prompt_ids: Any = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    if prompt_ids[-1:] == [eos] and not prompt.endswith(str(tokenizer.eos_token)):
        prompt_ids = prompt_ids[:-1]  # which a tokenizer with add_eos_token puts behind every text
    if completion is None:
        return Turn(prompt_ids, None)
    tokens: Any = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if eos is not None and tokens[-1:] != [eos]:
        tokens = [*tokens, eos]
    return Turn(prompt_ids, tokens)


class _Chat(NamedTuple):
    """A chat template with its options."""

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]
    tools: Any

    @classmethod
    def of_row(cls, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> _Chat:
        return cls(tokenizer, config.chat_template_options, _parse("tools", row.get("tools")))

    def render(self, messages: list[dict[str, Any]], *, for_generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=self.tools or None,
                    add_generation_prompt=for_generation,
                    tokenize=False,
                    **self.options,
                )
            )
        except Exception as error:  # templates raise many types
            if self.tokenizer.chat_template is None:
                raise RowError(
                    "messages need a chat template, which the student's tokenizer lacks: take a chat model, "
                    "save the tokenizer with a chat_template, or give texts in the column prompt"
                ) from None
            raise RowError(f"cannot be rendered by the chat template: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Tokenize a rendered text, which has its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def tokenize(self, messages: list[dict[str, Any]]) -> Turn:
        """Return the turn of the last message: what the template adds to the conversation before it.

        If it is not the assistant's, all messages are the prompt of an answer.
        """
        if messages[-1]["role"] != "assistant":
            return Turn(self.encode(self.render(messages, for_generation=True)), None)
        before = self.render(messages[:-1], for_generation=False) if len(messages) > 1 else ""
        prompt = self.render(messages[:-1], for_generation=True) if len(messages) > 1 else ""
        text = self.render(messages, for_generation=False)
        # Some templates prompt for a thought that they leave out of a finished answer.
        same = map(eq, prompt, text)
        start = next((i for i, equal in enumerate(same) if not equal), min(len(prompt), len(text)))
        if start < len(before) or not text.startswith(before):
            raise RowError(
                "cannot be split into prompt and completion: with the answer, the chat template renders the "
                f"conversation before it differently ({shortened(text[start:])} instead of "
                f"{shortened(prompt[start:])}); data.chat_template_options may help"
            )
        if start < len(prompt):
            start = max(self._token_end(prompt, start), len(before))
        return Turn(self.encode(text[:start]), self._without_space_after_end(self.encode(text[start:])))

    def _token_end(self, text: str, position: int) -> int:
        """Return the position, or where the last token ends before it if it is inside a token."""
        if not self.tokenizer.is_fast:  # does not know where its tokens are
            return position
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: Any = encoded["offset_mapping"]
        return max((end for _, end in offsets if end <= position), default=0)

    def _without_space_after_end(self, tokens: list[int]) -> list[int]:
        """Drop white space behind the token that ends the turn, where generation stops."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        end = len(tokens)
        while (
            end and tokens[end - 1] not in special and not str(self.tokenizer.decode(tokens[end - 1])).strip()
        ):
            end -= 1
        return tokens[:end] if end and tokens[end - 1] in special else tokens


def _read_messages(column: str, value: Any) -> list[dict[str, Any]]:
    """Return messages with role and content, without the empty fields that tables add."""
    messages = _parse(column, value)
    if not isinstance(messages, list) or not messages:
        texts = ("prompt", "completion", "teacher_prompt")
        kinds = "text or a list of messages" if column in texts else "a list of messages"
        raise RowError(f"column {column}: must be {kinds}, got {shortened(value)}")
    return [_read_message(f"column {column}: message {i}", message) for i, message in enumerate(messages)]


def _read_message(name: str, message: Any) -> dict[str, Any]:
    message = _without_none(message)
    if isinstance(message, dict) and "from" in message:
        message = {
            "role": _ROLES.get(message["from"]),
            "content": message.get("value"),
            "from": message["from"],
        }
        if message["role"] is None:
            raise RowError(
                f"{name}: from must be one of {', '.join(_ROLES)}, got {shortened(message['from'])}"
            )
        del message["from"]
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{name}: must have a role and content, got {shortened(message)}")
    if "tool_calls" not in message and not isinstance(message.get("content"), str | list):
        raise RowError(f"{name}: must have content, got {shortened(message)}")
    return message


def _parse(column: str, value: Any) -> Any:
    """Return the value, from JSON if it is text, as in a CSV file."""
    if not isinstance(value, str):
        return _without_none(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"column {column}: must be a list, or one as JSON, got {shortened(value)}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
