"""A run's settings: a YAML file and KEY=VALUE overrides, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that does not fit; the message names its key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Rows with `prompt` (text) or `messages` (a chat), and for off-policy slices `completion` (text), or
    messages that end with the assistant's."""

    path: str = Field(description="JSONL or Parquet file, or a hub data set's name")
    name: str | None = Field(None, description="of one of a hub data set's configurations")
    split: str = Field("train", description="of a hub data set")
    evaluation_prompts: int = Field(16, ge=0, description="rows held out, the last ones")
    max_prompt_length: int = Field(512, ge=1, description="tokens; rows with longer prompts are left out")


class TeacherConfig(_Section):
    """One of model, url and stored."""

    model: str | None = Field(None, description="local path or hub name of a teacher in this process")
    url: list[str] | str | None = Field(None, description="teacher server, ours or a stock vLLM's; or a list")
    stored: Path | None = Field(None, description="folder of `fused-distill cache-teacher`; off-policy only")
    targets: Literal["full", "topk", "student_topk"] = Field(
        "full", description="full: every token (from a server by hidden states); or k of the teacher, student"
    )
    k: int = Field(64, ge=1, description="tokens of topk and student_topk")
    tail: Literal["bucket", "renormalize", "truncate"] = Field(
        "bucket", description="what becomes of the other tokens, see fused_linear_topk_jsd"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of model; auto: bfloat16 on a GPU, else float32"
    )

    @model_validator(mode="after")
    def _one_of(self) -> TeacherConfig:
        if sum(value is not None for value in (self.model, self.url, self.stored)) != 1:
            raise ValueError("must have one of model, url and stored")
        if self.stored is not None and self.targets != "topk":
            raise ValueError(f"targets must be topk with stored, got {self.targets}")
        return self


class RolloutConfig(_Section):
    """How the student writes."""

    url: str | None = Field(None, description="vLLM server (VLLM_SERVER_DEV_MODE=1); null: transformers")
    sync_every: int = Field(
        1, ge=1, description="optimizer steps from one update of the server's weights to the next"
    )
    num_generations: int = Field(1, ge=1, description="completions of each prompt")
    max_completion_length: int = Field(128, ge=1, description="tokens, of the data's completions too")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens")


class LoraConfig(_Section):
    """Low-rank adapters instead of all weights, by PEFT."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1)
    target_modules: list[str] | str = Field("all-linear")


class TrainConfig(_Section):
    """On-policy distillation of a student."""

    student: str = Field(description="local path or hub name")
    teacher: TeacherConfig
    data: DataConfig
    rollouts: RolloutConfig = RolloutConfig.model_validate({})
    lora: LoraConfig | None = Field(None, description="none: all weights are trained")
    frozen: list[str] = Field([], description="parameters with one of these in their name are not trained")
    output: Path = Field(description="folder for metrics, checkpoints, report and student")
    steps: int = Field(ge=1, description="optimizer steps")
    prompts_per_step: int = Field(16, ge=1, description="of all processes together")
    gradient_accumulation_steps: int = Field(1, ge=1, description="slices of a step in each process")
    lmbda: float = Field(
        1.0, ge=0, le=1, description="probability that the student writes a slice; else the data"
    )
    beta: float = Field(0.5, ge=0, le=1, description="0 forward KL, 1 reverse KL, between them JSD")
    temperature: float = Field(1.0, gt=0, description="of both models in the loss")
    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="of the learning rate"
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16, fp16: mixed precision, by accelerate"
    )
    evaluate_every: int = Field(50, ge=1, description="steps; also before the first and after the last")
    save_every: int = Field(50, ge=1, description="steps; also after the last")
    keep_checkpoints: int = Field(2, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field([], description="beside metrics.jsonl")
    seed: int = Field(0, ge=0, lt=1 << 20)

    @model_validator(mode="after")
    def _together(self) -> TrainConfig:
        if self.teacher.stored is not None and self.lmbda > 0:
            raise ValueError("lmbda must be 0 with teacher.stored, which knows the data's completions only")
        if self.lora is not None and self.rollouts.url is not None:
            raise ValueError("lora must not be given with rollouts.url: adapters are not sent to the server")
        return self


# What may be other than it was when a run goes on: how long, where and on what machines.
_FREE: Any = {
    **dict.fromkeys(("student", "output", "steps", "gradient_accumulation_steps", "trackers"), True),
    **dict.fromkeys(("evaluate_every", "save_every", "keep_checkpoints"), True),
    "data": {"path"},
    "teacher": {"model", "url", "stored"},
    "rollouts": {"url"},
}


def lasting(config: TrainConfig) -> dict[str, Any]:
    """By their keys, the settings that a run keeps when it goes on."""

    def flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(flat(config.model_dump(mode="json", exclude=_FREE)))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, then KEY=VALUE overrides such as teacher.k=16, whose values are YAML too.

    Raises:
        ConfigError: naming the key.
    """
    content = _yaml(str(path), Path(path).read_text()) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"an override must be KEY=VALUE, got {override!r}")
        section, *names = content, *key.split(".")
        for name in names[:-1]:
            section[name] = {} if section.get(name) is None else section[name]
            section = section[name]
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {name} has no keys of its own")
        section[names[-1]] = _yaml(key, value)
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(problems)) from None


def _yaml(where: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: no YAML: {' '.join(str(error).split())}") from error


def described(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """A line for every key, for --help."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is not None:
            yield f"{prefix}{name}: {section.__doc__}"
            yield from described(section, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f" [{json.dumps(field.default)}]"
        yield f"{prefix}{name}{default}  {field.description or ''}".rstrip()
