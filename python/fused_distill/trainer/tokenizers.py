"""The tokenizers of teachers: whose chat template renders messages, and whether ids mean the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ..huggingface.loading import find_tokenizer
from .config import ConfigError, TeacherConfig


def chat_tokenizer(key: str, teacher: TeacherConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer whose chat template renders messages for a teacher, None for the student's.

    Raises:
        ConfigError: there is no tokenizer or it has no chat template (the message begins with the key).
    """
    if teacher.chat_template == "student" or teacher.tokenizer_name is None:
        return None
    tokenizer: PreTrainedTokenizerBase | None = find_tokenizer(teacher.tokenizer_name)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ConfigError(f"{key}.chat_template: must be student, as {teacher.tokenizer_name} has none")
    return tokenizer
