"""Tests of the formats of a row: text, TRL's and ShareGPT's conversations, and ends of completions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fused_distill.trainer.config import DataConfig
from fused_distill.trainer.conversations import RowError, Turn, tokenize_row
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED
# As ChatML, with a line break behind the end of a turn.
CHAT = """\
{%- if tools %}{{ tools[0].function.name }}!{% endif -%}
{%- if shout %}!{% endif -%}
{%- for m in messages %}<s>{{ m.role[0] }} {{ m.content }}<e> {% endfor -%}
{%- if add_generation_prompt %}<s>a {% endif -%}"""
# The prompt starts a thought, which a finished answer does not have.
THINKING = CHAT.replace("<s>a {% endif", "<s>a <t>{% endif")
# Earlier answers lose their last character.
FORGETFUL = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:-1] }}")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CHATTED = ("<s>u hi<e> <s>a ", "yo<e>")


@pytest.fixture
def tokenizer(lab: Lab) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<e>", "<t>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def turns(tokenizer: Any, row: dict[str, Any], **options: Any) -> list[tuple[str, str | None]]:
    """Return the turns of a row as text."""

    def text(tokens: list[int] | None) -> str | None:
        return None if tokens is None else "".join(tokenizer.convert_ids_to_tokens(tokens))

    found = tokenize_row(row, tokenizer, DataConfig.model_validate({"path": "chats.jsonl", **options}))
    assert all(isinstance(turn, Turn) for turn in found)
    return [(str(text(turn.prompt)), text(turn.completion)) for turn in found]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER], "completion": "yo"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"conversations": [USER, ANSWER], "prompt": None, "tools": None},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": None}]},
    ],
)
def test_every_format_of_a_conversation_gives_the_same_turn(tokenizer: Any, row: dict[str, Any]) -> None:
    assert turns(tokenizer, row) == [CHATTED]


def test_a_conversation_without_answer_is_a_prompt(tokenizer: Any) -> None:
    assert turns(tokenizer, {"messages": [USER]}) == [(CHATTED[0], None)]


def test_text_ends_with_eos_once(tokenizer: Any) -> None:
    for completion in ("yo", "yo<eos>"):
        assert turns(tokenizer, {"prompt": "hi", "completion": completion}) == [("hi", "yo<eos>")]


@pytest.mark.parametrize("prompt", ["hi", "<unk>hi"])
def test_text_gets_one_bos(tokenizer: Any, prompt: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 2)]
    )
    tokenizer.bos_token = "<unk>"
    assert turns(tokenizer, {"prompt": prompt}) == [("<unk>hi", None)]


def test_a_tokenizer_that_ends_every_text_does_not_end_prompts(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert turns(tokenizer, {"prompt": "hi", "completion": "yo"}) == [("hi", "yo<eos>")]


def test_all_turns_are_samples_with_the_conversation_before_them(tokenizer: Any) -> None:
    row = {"messages": [USER, ANSWER, USER, ANSWER, USER]}
    first = CHATTED[0]
    second = f"{first}yo<e> {first}"
    assert turns(tokenizer, row, train_on="all_turns") == [
        (first, "yo<e>"),
        (second, "yo<e>"),
        (f"{second}yo<e> {first}", None),
    ]
    assert turns(tokenizer, {"messages": row["messages"][:4]}) == [(second, "yo<e>")]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_options_reach_the_template(tokenizer: Any, as_json: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": [USER, ANSWER], "tools": json.dumps(tools) if as_json else tools}
    [(prompt, _)] = turns(tokenizer, row, chat_template_options={"shout": True})
    assert prompt == f"add!!{CHATTED[0]}"


def test_a_thought_that_a_finished_answer_does_not_have_is_not_in_its_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    assert turns(tokenizer, {"messages": [USER, ANSWER]}) == [CHATTED]
    assert turns(tokenizer, {"messages": [USER]}) == [(f"{CHATTED[0]}<t>", None)]


def test_an_answer_that_begins_like_the_thought_does_not_split_its_token(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    row = {"messages": [USER, {"role": "assistant", "content": "<yo"}]}
    [(prompt, completion)] = turns(tokenizer, row)
    assert prompt == CHATTED[0]
    assert completion is not None
    assert completion.endswith("yo<e>")


def test_a_template_that_changes_the_conversation_before_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(RowError, match="renders the conversation before it differently"):
        turns(tokenizer, {"messages": [USER, ANSWER]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "must have exactly one of the columns prompt, messages, conversations, got text"),
        ({"prompt": "a", "messages": [USER]}, "exactly one of .*, got prompt, messages"),
        ({"prompt": None}, "exactly one of .*, got prompt"),
        ({"prompt": 3}, "column prompt: must be text or a list of messages, got 3"),
        ({"prompt": []}, r"column prompt: must be text or a list of messages, got \[\]"),
        ({"prompt": ["a"]}, "column prompt: message 0: must have a role and content, got 'a'"),
        ({"prompt": "a", "completion": 3}, "column completion: must be text, as the prompt is, got 3"),
        ({"prompt": "a", "completion": [ANSWER]}, "column completion: must be text, as the prompt is, got "),
        ({"messages": "hi"}, "column messages: must be a list, or one as JSON, got 'hi'"),
        ({"messages": [{"content": "a"}]}, "column messages: message 0: must have a role"),
        ({"messages": [{"role": "user"}]}, "column messages: message 0: must have content"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "column conversations: message 0: from must be one of system, .*, got 'robot'",
        ),
        (
            {"messages": [USER, ANSWER], "completion": "b"},
            "column completion: must be empty if messages ends",
        ),
        (
            {"messages": [USER], "completion": [USER]},
            "column completion: must end with .* assistant, got user",
        ),
    ],
)
def test_an_invalid_row_is_refused_with_column_and_value(
    tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        turns(tokenizer, row)


def test_messages_without_a_chat_template_are_told_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        RowError, match=r"^messages need a chat template, which the student's tokenizer lacks: "
    ):
        turns(tokenizer, {"messages": [USER]})
