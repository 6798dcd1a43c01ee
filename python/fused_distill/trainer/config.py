"""Settings of a run: a YAML file and KEY=VALUE overrides, validated before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ..config import Divergence, LossConfig, Surplus, TopKLossConfig
from .section import Section, Texts, problem
from .teacher_config import ConfigError, Dtype, TeacherConfig

POLICIES = ("on_policy", "off_policy")  # metrics of these slices of a step begin with them
Engine = Literal["transformers", "vllm", "vllm_server"]


class DataConfig(Section):
    """Rows with `prompt` (text or messages), `messages` or ShareGPT's `conversations`. Off-policy data also
    needs `completion` (text or messages) or a conversation that ends with the assistant's message."""

    path: Texts = Field(
        description="JSONL, JSON, CSV or Parquet file (also .gz), a pattern, a list of these, or a hub name"
    )
    name: str | None = Field(None, description="dataset configuration name")
    split: str = Field("train", description="dataset split")
    train_on: Literal["last", "all_turns"] = Field(
        "last", description="last: the assistant's last message; all_turns: each of its messages"
    )
    chat_template_options: dict[str, Any] = Field(
        {}, description="arguments of the chat template, e.g. {enable_thinking: false}"
    )
    teacher_column: str = Field(
        "teacher", description="column with the name of a row's teacher in `teachers`"
    )
    evaluation_prompts: int = Field(16, ge=0, description="number of samples held out from the end")
    max_prompt_length: int = Field(512, ge=1, description="tokens; samples with longer prompts are dropped")


class RolloutConfig(Section):
    """Rollout generation."""

    engine: Engine = Field("transformers", description="vllm: in each process; vllm_server: a stock server")
    url: str | None = Field(None, description="address of the vllm_server")
    engine_options: dict[str, Any] = Field({}, description="further arguments of vllm.LLM for engine vllm")
    sync: Literal["disk", "nccl"] = Field("disk", description="how vLLM gets weights; nccl: vllm_server only")
    nccl_address: str | None = Field(None, description="address of this machine seen from the vllm_server")
    nccl_port: int | None = Field(None, ge=1, le=65535, description="free port on this machine")
    sync_every: int = Field(1, ge=1, description="optimizer steps between two updates of vLLM's weights")
    ahead: Literal[0, 1] = Field(
        0, description="1: the vllm_server generates the next step's rollouts while this step trains"
    )
    importance_clip: float | None = Field(
        None, gt=0, description="weight tokens by p_now / p_then of the student, clipped to this; null: by 1"
    )
    num_generations: int = Field(1, ge=1, description="completions per prompt")
    batch_size: int = Field(32, ge=1, description="completions at once with engine transformers")
    max_completion_length: int = Field(128, ge=1, description="tokens; the data's completions are cut too")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: from all")

    @model_validator(mode="after")
    def _check_engine(self) -> RolloutConfig:
        if self.engine_options and self.engine != "vllm":
            raise ValueError(f"engine_options must not be set with engine {self.engine}, only with vllm")
        if self.ahead and self.engine != "vllm_server":
            raise ValueError(f"ahead must be 0 with engine {self.engine}, which generates in the trainer")
        if self.sync == "nccl" and self.engine != "vllm_server":
            raise ValueError(f"sync must be disk with engine {self.engine}, got nccl")
        if (self.url is not None) != (self.engine == "vllm_server"):
            given = self.model_dump()["url"]
            raise ValueError(f"url must be set exactly with engine vllm_server, got {given}")
        for name, value in (("nccl_address", self.nccl_address), ("nccl_port", self.nccl_port)):
            if (value is not None) != (self.sync == "nccl"):
                raise ValueError(f"{name} must be set exactly with sync nccl, got {value}")
        return self


class LoraConfig(Section):
    """Low-rank adapters (PEFT) instead of training all weights."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale of the adapters is alpha / r")
    target_modules: Texts = Field("all-linear", description="module names that get adapters")
    merge: bool = Field(False, description="save student/ as a whole model, with the adapters merged into it")


class TokenWeightConfig(Section):
    """One rule that gives some tokens weight 1 and all others weight 0. The loss is still a mean over all."""

    entropy_below: float | None = Field(None, gt=0, description="nats; tokens whose teacher entropy is lower")
    top_fraction: float | None = Field(
        None, gt=0, le=1, description="fraction of a forward pass's tokens, those of highest student entropy"
    )

    @model_validator(mode="after")
    def _check_rule(self) -> TokenWeightConfig:
        if (self.entropy_below is None) == (self.top_fraction is None):
            raise ValueError("must have one of entropy_below and top_fraction")
        return self


class TrainConfig(Section):
    """On-policy distillation of a student."""

    student: str = Field(description="local path or hub name")
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(
        {}, description="instead of teacher: several by name, e.g. {math: {...}, code: {...}}"
    )
    data: DataConfig
    rollouts: RolloutConfig = RolloutConfig.model_validate({})
    lora: LoraConfig | None = Field(None, description="null: train all weights")
    frozen: list[str] = Field([], description="do not train parameters whose name contains one of these")
    output: Path = Field(description="folder for metrics, checkpoints, report and student")
    steps: int = Field(ge=1, description="optimizer steps")
    prompts_per_step: int = Field(16, ge=1, description="prompts per optimizer step, over all processes")
    gradient_accumulation_steps: int = Field(1, ge=1, description="slices of a step in each process")
    tokens_per_forward: int | None = Field(
        None, ge=1, description="split slices so that a forward pass has at most so many tokens with padding"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, about a third more time"
    )
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = Field(
        None, description="of the student and of teacher.model; null: transformers' choice"
    )
    lmbda: float = Field(1.0, ge=0, le=1, description="probability that a slice is on-policy")
    objective: Literal["divergence", "sampled"] = Field(
        "divergence", description="sampled: policy gradient on the sampled tokens only, see docs"
    )
    divergence: Divergence = Field("jsd", description="see docs/divergences.md")
    beta: float = Field(0.5, ge=0, le=1, description="of jsd; 0: forward KL, 1: reverse KL, in between: JSD")
    alpha: float = Field(0.1, ge=0, lt=1, description="of skew_forward_kl and skew_reverse_kl")
    reverse_weight: float = Field(0.5, ge=0, le=1, description="of mixed_kl: weight of the reverse KL")
    entry_clip: float | None = Field(
        None, gt=0, description="largest term of a vocabulary entry in the divergence"
    )
    token_weight: TokenWeightConfig | None = Field(None, description="null: all tokens count alike")
    temperature: float = Field(1.0, gt=0, description="divides both models' logits in the loss")
    surplus: Surplus = Field(
        "ignore", description="count: penalize a student that uses rows of its LM head that the teacher lacks"
    )
    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warmup")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="gradients are clipped to this norm; .inf: never"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="mixed precision; auto: bf16 on a CUDA device that supports it, else fp32"
    )
    evaluate_every: int = Field(50, ge=1, description="steps; evaluation also runs at the start and the end")
    save_every: int = Field(50, ge=1, description="steps between checkpoints; one is also saved at the end")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics on the console")
    keep_checkpoints: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    save_dtype: Dtype = Field(
        "auto", description="of student/; auto: that of the input model. Adapters stay in float32"
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="also log metrics there"
    )
    seed: int = Field(0, ge=0, lt=1 << 20)

    @property
    def loss_options(self) -> dict[str, Any]:
        """The settings that are options of the losses."""
        names = ("divergence", "beta", "alpha", "entry_clip", "temperature", "surplus")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _check_combination(self) -> TrainConfig:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("one of teacher and teachers must be set")
        if self.divergence != "mixed_kl" and self.reverse_weight != 0.5:
            raise ValueError(f"reverse_weight is a setting of divergence mixed_kl, got {self.divergence}")
        for name in self.teachers:
            if name in POLICIES or "/" in name or name != name.strip() or not name or not name.isprintable():
                raise ValueError(
                    f"teachers: {name!r} is no name for metrics such as NAME/loss: it must have printable "
                    f"characters other than /, no space at its ends, and not be {' or '.join(POLICIES)}"
                )
        for teacher in self.all_teachers.values():
            tail: dict[str, Any] = {} if teacher.targets == "full" else {"tail": teacher.tail}
            (TopKLossConfig if tail else LossConfig)(**self.loss_options, **tail)
        if self.uses_store and self.lmbda > 0:
            raise ValueError("lmbda must be 0 with teacher.stored, which knows the data's completions only")
        if self.objective == "sampled":
            for name, value in (("lmbda", self.lmbda), ("temperature", self.temperature)):
                if value != 1:
                    raise ValueError(f"{name} must be 1 with objective sampled, got {value}")
        return self

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Return the teachers by name; a single one has the name ""."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def uses_store(self) -> bool:
        """Return whether a teacher knows the data's completions only."""
        return any(teacher.stored is not None for teacher in self.all_teachers.values())


_FREE_OF_TEACHER: Any = {
    **dict.fromkeys(("model", "url", "stored", "deadline_seconds", "tokenizer"), True),
    "load": {"device_map", "attn_implementation"},
}
# Settings that may change on resume: the length of the run, its files and its machines.
_FREE_ON_RESUME: Any = {
    **dict.fromkeys(("student", "output", "steps", "gradient_accumulation_steps", "trackers"), True),
    **dict.fromkeys(("tokens_per_forward", "gradient_checkpointing", "attention"), True),
    **dict.fromkeys(("evaluate_every", "save_every", "log_every", "keep_checkpoints", "save_dtype"), True),
    "lora": {"merge"},
    "data": {"path"},
    "teacher": _FREE_OF_TEACHER,
    "teachers": {"__all__": _FREE_OF_TEACHER},
    "rollouts": {"engine", "batch_size", "url", "engine_options", "sync", "nccl_address", "nccl_port"},
}


def resume_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that must match on resume, with dotted keys."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude=_FREE_ON_RESUME)
    sections = {name: settings.pop(name) for name, value in [*settings.items()] if isinstance(value, dict)}
    return {f"{name}.{key}": v for name in sections for key, v in sections[name].items()} | settings


def flat_settings(config: BaseModel, changed: bool = False) -> dict[str, Any]:
    """Return the settings with dotted keys, without passwords; with `changed` those that are no default."""

    def flatten(prefix: str, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, dict) and value:
                yield from flatten(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    # pydantic keeps a field with a serializer although it has its default, which is None for all of them.
    settings = config.model_dump(mode="json", exclude_defaults=changed, exclude_none=changed)
    return dict(flatten("", settings))


def load_config(
    path: Path | str, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a YAML file and apply KEY=VALUE overrides such as teacher.k=16, whose values are YAML too.

    Args:
        path: of the file.
        overrides: they win over the file.
        defaults: the file wins over them.

    Raises:
        ConfigError: the file, an override or a setting is invalid (the message names the key).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    content = _parse_yaml(str(path), text) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values")
    content = {**(defaults or {}), **content}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise ConfigError(f"an override must be KEY=VALUE, got {override!r}")
        section: dict[str, Any] = content
        *names, last = key.split(".")
        for name in names:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        is_pattern = value.startswith("*")  # which YAML would take for an alias
        section[last] = value if is_pattern else _parse_yaml(key, value)
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError("; ".join(problem(e, TrainConfig) for e in error.errors())) from None


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML's own loader takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: Any = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen and key.value != "<<":
                raise ConfigError(f"{key.value} is given twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))
        return node


def _parse_yaml(source: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: no YAML: {' '.join(str(error).split())}") from error
