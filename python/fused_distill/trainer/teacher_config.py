"""Settings of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import Tail
from .section import Section, Texts

Targets = Literal["full", "topk", "student_topk"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """An invalid setting; the message names its key."""


_NOT_OF_LOAD = {
    **dict.fromkeys(("dtype", "torch_dtype"), "set teacher.dtype"),
    **dict.fromkeys(("token", "use_auth_token"), "set the environment variable HF_TOKEN"),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes"), "the trainer sets it"),
}


class TeacherConfig(Section):
    """Exactly one of model, url and stored."""

    model: str | None = Field(
        None, description="local path or hub name of a teacher loaded in this process; self: the student"
    )
    refresh_every: int | None = Field(
        None,
        ge=1,
        description="of model self: copy the student every so many steps; null: as it was at the start",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of model self: teacher = ema * teacher + (1 - ema) * student after a step",
    )
    url: Texts | None = Field(None, description="teacher server or servers: ours, vLLM or SGLang")
    stored: Path | None = Field(None, description="folder of `fused-distill cache-teacher`; off-policy only")
    targets: Targets = Field(
        "full", description="topk: teacher's top k; student_topk: at the student's top k"
    )
    k: int = Field(64, ge=1, description="tokens per position of topk and student_topk")
    tail: Tail = Field("bucket", description="see fused_linear_topk_jsd")
    chat_template: Literal["student", "own"] = Field(
        "student", description="whose chat template renders messages for the teacher"
    )
    tokenizer: str | None = Field(
        None, description="local path or hub name of its tokenizer, if not that of teacher.model"
    )
    dtype: Dtype = Field("auto", description="of teacher.model; auto: bfloat16 on a GPU, float32 on a CPU")
    load: dict[str, Any] = Field(
        {}, description="further arguments of from_pretrained for teacher.model, e.g. quantization_config"
    )
    deadline_seconds: float = Field(
        1200.0,
        gt=0,
        description="longest wait for an answer of teacher.url, e.g. while the server restarts",
    )

    @model_validator(mode="after")
    def _check_source(self) -> TeacherConfig:
        if sum(value is not None for value in (self.model, self.url, self.stored)) != 1:
            raise ValueError("must have one of model, url and stored")
        if self.stored is not None and self.targets != "topk":
            raise ValueError(f"targets must be topk with stored, got {self.targets}")
        for name in ("k", "tail"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.targets == "full" and value != default:
                advice = f"set targets: topk, or {name}: {default}"
                raise ValueError(f"{name} has no effect with targets full, got {value}: {advice}")
        for name in ("refresh_every", "ema"):
            if getattr(self, name) is not None and not self.is_self:
                raise ValueError(f"{name} must be null unless model is self, got {getattr(self, name)}")
        if self.refresh_every is not None and self.ema is not None:
            raise ValueError("must have at most one of refresh_every and ema")
        if self.load and self.model is None:
            raise ValueError(
                f"load must be empty with {self.source}, which loads no model here, got {self.load}"
            )
        for option in {*self.load} & {*_NOT_OF_LOAD}:
            raise ValueError(f"load must not have {option}: {_NOT_OF_LOAD[option]}")
        for name, default in (
            ("load", {}),
            ("tokenizer", None),
            ("chat_template", "student"),
            ("dtype", "auto"),
        ):
            if self.is_self and getattr(self, name) != default:
                raise ValueError(f"{name} must not be set with model self, got {getattr(self, name)}")
        if self.chat_template == "own" and self.tokenizer_name is None:
            raise ValueError("chat_template own needs tokenizer with url and stored")
        return self

    @property
    def source(self) -> Literal["model", "url", "stored"]:
        """Return which of the three it is."""
        return "model" if self.model is not None else "url" if self.url is not None else "stored"

    @property
    def tokenizer_name(self) -> str | None:
        """Return the path or name of the teacher's tokenizer, None if it is unknown."""
        return self.tokenizer or (None if self.is_self else self.model)

    @property
    def is_self(self) -> bool:
        """Return whether the teacher is the student, as it is or was."""
        return self.model == "self"

    @property
    def follows_student(self) -> bool:
        """Return whether the teacher's weights change with the student's."""
        return self.refresh_every is not None or self.ema is not None
