"""Settings of a run: a YAML file and KEY=VALUE overrides, validated before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """An invalid setting; the message names its key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Rows with `prompt` (string) or `messages` (chat). Off-policy data also needs `completion` (string)
    or messages that end with the assistant's."""

    path: str = Field(description="JSONL or Parquet file, or name of a dataset on the Hugging Face hub")
    name: str | None = Field(None, description="dataset configuration name")
    split: str = Field("train", description="dataset split")
    evaluation_prompts: int = Field(16, ge=0, description="number of rows held out from the end")
    max_prompt_length: int = Field(512, ge=1, description="tokens; rows with longer prompts are skipped")


class TeacherConfig(_Section):
    """Exactly one of model, url and stored."""

    model: str | None = Field(None, description="local path or hub name of a teacher loaded in this process")
    url: list[str] | str | None = Field(
        None, description="teacher server or list of servers (fused-distill serve-teacher, or stock vLLM)"
    )
    stored: Path | None = Field(None, description="folder of `fused-distill cache-teacher`; off-policy only")
    targets: Literal["full", "topk", "student_topk"] = Field(
        "full",
        description="full: exact loss; topk: teacher's top k; student_topk: teacher at the student's top k",
    )
    k: int = Field(64, ge=1, description="tokens per position of topk and student_topk")
    tail: Literal["bucket", "renormalize", "truncate"] = Field(
        "bucket", description="how probability outside the k tokens is treated, see fused_linear_topk_jsd"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of teacher.model; auto: bfloat16 on a GPU, float32 on a CPU"
    )

    @model_validator(mode="after")
    def _check_source(self) -> TeacherConfig:
        if sum(value is not None for value in (self.model, self.url, self.stored)) != 1:
            raise ValueError("must have one of model, url and stored")
        if self.stored is not None and self.targets != "topk":
            raise ValueError(f"targets must be topk with stored, got {self.targets}")
        return self


class RolloutConfig(_Section):
    """Rollout generation."""

    engine: Literal["transformers", "vllm", "vllm_server"] = Field(
        "transformers",
        description="transformers: the student itself; vllm: a vLLM engine in each trainer process; "
        "vllm_server: a stock vLLM server started with VLLM_SERVER_DEV_MODE=1",
    )
    url: str | None = Field(None, description="address of the vllm_server")
    engine_options: dict[str, Any] = Field(
        {}, description="further arguments of vllm.LLM for engine vllm, e.g. {gpu_memory_utilization: 0.3}"
    )
    sync: Literal["disk", "nccl"] = Field(
        "disk", description="how vLLM receives the student's weights; nccl: for vllm_server, no disk involved"
    )
    nccl_address: str | None = Field(
        None, description="address of this machine as the vllm_server reaches it"
    )
    nccl_port: int | None = Field(None, ge=1, le=65535, description="free port on this machine")
    sync_every: int = Field(1, ge=1, description="optimizer steps between two updates of vLLM's weights")
    num_generations: int = Field(1, ge=1, description="completions per prompt")
    max_completion_length: int = Field(128, ge=1, description="tokens; the data's completions are cut too")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: from all")

    @model_validator(mode="after")
    def _check_engine(self) -> RolloutConfig:
        if self.engine_options and self.engine != "vllm":
            raise ValueError(f"engine_options must not be set with engine {self.engine}, only with vllm")
        if self.sync == "nccl" and self.engine != "vllm_server":
            raise ValueError(f"sync must be disk with engine {self.engine}, got nccl")
        needs_url, needs_nccl = self.engine == "vllm_server", self.sync == "nccl"
        for name, needed, setting in (
            ("url", needs_url, "engine vllm_server"),
            ("nccl_address", needs_nccl, "sync nccl"),
            ("nccl_port", needs_nccl, "sync nccl"),
        ):
            if needed != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be set exactly with {setting}, got {getattr(self, name)}")
        return self


class LoraConfig(_Section):
    """Low-rank adapters (PEFT) instead of training all weights."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale of the adapters is alpha / r")
    target_modules: list[str] | str = Field("all-linear", description="module names that get adapters")


class TrainConfig(_Section):
    """On-policy distillation of a student."""

    student: str = Field(description="local path or hub name")
    teacher: TeacherConfig
    data: DataConfig
    rollouts: RolloutConfig = RolloutConfig.model_validate({})
    lora: LoraConfig | None = Field(None, description="null: train all weights")
    frozen: list[str] = Field([], description="do not train parameters whose name contains one of these")
    output: Path = Field(description="folder for metrics, checkpoints, report and student")
    steps: int = Field(ge=1, description="optimizer steps")
    prompts_per_step: int = Field(16, ge=1, description="prompts per optimizer step, over all processes")
    gradient_accumulation_steps: int = Field(1, ge=1, description="slices of a step in each process")
    lmbda: float = Field(1.0, ge=0, le=1, description="fraction of on-policy data")
    beta: float = Field(0.5, ge=0, le=1, description="0: forward KL, 1: reverse KL, in between: JSD")
    temperature: float = Field(1.0, gt=0, description="divides both models' logits in the loss")
    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warmup")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="learning rate schedule"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16 and fp16: mixed precision by accelerate"
    )
    evaluate_every: int = Field(50, ge=1, description="steps; evaluation also runs at the start and the end")
    save_every: int = Field(50, ge=1, description="steps between checkpoints; one is also saved at the end")
    keep_checkpoints: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="log metrics there in addition to metrics.jsonl"
    )
    seed: int = Field(0, ge=0, lt=1 << 20)

    @model_validator(mode="after")
    def _check_combination(self) -> TrainConfig:
        if self.teacher.stored is not None and self.lmbda > 0:
            raise ValueError("lmbda must be 0 with teacher.stored, which knows the data's completions only")
        if self.lora is not None and self.rollouts.engine != "transformers":
            raise ValueError(
                f"lora must not be given with rollouts.engine {self.rollouts.engine}: vLLM gets no adapters"
            )
        return self


# Settings that may change on resume: the length of the run, its files and its machines.
_FREE_ON_RESUME: Any = {
    **dict.fromkeys(("student", "output", "steps", "gradient_accumulation_steps", "trackers"), True),
    **dict.fromkeys(("evaluate_every", "save_every", "keep_checkpoints"), True),
    "data": {"path"},
    "teacher": {"model", "url", "stored"},
    "rollouts": {"engine", "url", "engine_options", "sync", "nccl_address", "nccl_port"},
}


def resume_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that must match on resume, flattened to dotted keys."""

    def flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(flatten(config.model_dump(mode="json", exclude=_FREE_ON_RESUME)))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply KEY=VALUE overrides such as teacher.k=16, whose values are YAML too.

    Raises:
        ConfigError: the file, an override or a setting is invalid (the message names the key).
    """
    content = _parse_yaml(str(path), Path(path).read_text()) or {}
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
        section[names[-1]] = _parse_yaml(key, value)
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(problems)) from None


def _parse_yaml(source: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: no YAML: {' '.join(str(error).split())}") from error


def help_lines(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield one line of help per key."""
    for name, field in model.model_fields.items():
        types = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if section is not None:
            yield f"{prefix}{name}: {' '.join((section.__doc__ or '').split())}"
            yield from help_lines(section, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f" [{json.dumps(field.default)}]"
        yield f"{prefix}{name}{default}  {field.description or ''}".rstrip()
