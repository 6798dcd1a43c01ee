"""Sources of the teacher's distribution: a model in this process, a server, or a store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..huggingface.fingerprint import model_fingerprint
from ..huggingface.lm_head import LMHeadParams, checked_head, last_hidden_states
from ..huggingface.loading import weights_dtype
from ..serving.client.client import TeacherClient
from ..serving.client.retry import ServerError
from .config import ConfigError, TeacherConfig, TrainConfig
from .data import Batch, Data
from .long_sequences import check_positions, set_attention
from .sharding import shard_teacher
from .stored import StoredTeacher
from .student import check_lm_head, load_pretrained, load_student
from .targets import FullTargets, Kind, Targets, Teacher, TopKTargets, topk_targets
from .vocabulary import common_tokens

_START_SECONDS = 60.0  # a server that does not answer for so long at the start is taken for absent


@dataclass
class LocalTeacher:
    """A model in this process."""

    model: PreTrainedModel
    config: TrainConfig
    settings: TeacherConfig
    kind: Kind
    vocab_size: int
    fingerprint: str | None

    @torch.no_grad()
    def targets(self, batch: Batch, student_ids: Tensor | None) -> Targets:
        """See Teacher."""
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention, "use_cache": False}
        hidden = batch.pack(last_hidden_states(self.model, **inputs))
        head, _ = checked_head(self.model)  # whole by now if the model is sharded
        if self.kind in ("full", "exact"):
            return FullTargets(hidden, head)
        return topk_targets(hidden, head, self.config, self, student_ids)


@dataclass
class HiddenStateTeacher:
    """A teacher server that returns hidden states, with a local copy of its LM head."""

    client: TeacherClient
    head: LMHeadParams
    settings: TeacherConfig
    vocab_size: int
    fingerprint: str | None
    kind: Kind = "full"

    def targets(self, batch: Batch, student_ids: Tensor | None) -> FullTargets:
        """See Teacher; student_ids must be None."""
        dtype = "float32" if self.head.weight.dtype == torch.float32 else "bfloat16"
        hidden = self.client.get_hidden_states(*batch.sequences(), dtype=dtype)
        return FullTargets(hidden.states.to(self.head.weight), self.head)


@dataclass
class ServedTeacher:
    """A teacher server that returns log-probabilities: ours, vLLM or SGLang."""

    client: TeacherClient
    config: TrainConfig
    settings: TeacherConfig
    kind: Kind
    vocab_size: int
    fingerprint: str | None
    normalizes: bool  # over vocab_size tokens; else over all rows of its own LM head

    def targets(self, batch: Batch, student_ids: Tensor | None) -> TopKTargets:
        """See Teacher."""
        k, score_ids = self.settings.k, None
        sampled = self.kind == "sampled"
        if sampled:
            k = 0
        elif student_ids is not None:
            k, score_ids = 0, [ids.numpy() for ids in student_ids.cpu().split(batch.lengths)]
        answer = self.client.get_sequence_logprobs(
            *batch.sequences(),
            top_logprobs=k,
            score_ids=score_ids,
            temperature=self.config.temperature,
            vocab_size=self.vocab_size if self.normalizes else None,
        )
        device = batch.valid.device
        if sampled and student_ids is not None:
            return TopKTargets(torch.as_tensor(answer.actual_logprobs, device=device)[:, None], student_ids)
        if student_ids is not None and answer.score_logprobs is not None:
            return TopKTargets(torch.as_tensor(answer.score_logprobs, device=device), student_ids)
        logprobs, ids = (torch.as_tensor(numbers, device=device) for numbers in (answer.logprobs, answer.ids))
        # Tokens without a row in the student's LM head belong to the tail.
        return TopKTargets(logprobs.masked_fill(ids >= self.vocab_size, -torch.inf), ids)


def load_teachers(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, shard: bool = False
) -> dict[str, Teacher]:
    """Load the teachers that the settings name, for a student with the given tokenizer.

    With `shard` a model is sharded between all processes, which then compute together.
    """
    if shard and len(config.all_teachers) > 1 and any(t.model for t in config.all_teachers.values()):
        raise ConfigError(
            "teachers: with FSDP only a single teacher may have a model, which is sharded, because processes "
            "ask several teachers at different times. Serve the models (teachers.NAME.url)"
        )
    for settings in config.all_teachers.values():
        if shard and "device_map" in settings.load:
            raise ConfigError("teacher.load: must not have device_map with FSDP, which shards the teacher")
        if shard and settings.follows_student:
            key = "ema" if settings.refresh_every is None else "refresh_every"
            raise ConfigError(f"teacher.{key}: must be null with FSDP, which shards student and teacher")
    teachers: dict[str, Teacher] = {}
    for name, settings in config.all_teachers.items():
        with _key_of(name):
            teachers[name] = _load_teacher(config, settings, tokenizer, device, shard)
    return teachers


def evaluating(teachers: dict[str, Teacher]) -> dict[str, Teacher]:
    """Return the teachers for an evaluation, in which models in this process give whole distributions."""
    return {
        name: replace(teacher, kind="exact")
        if isinstance(teacher, LocalTeacher) and teacher.kind != "full"
        else teacher
        for name, teacher in teachers.items()
    }


def common_vocabulary(teachers: dict[str, Teacher]) -> int:
    """Return the number of tokens, from the first, that the student and all teachers have."""
    return min(teacher.vocab_size for teacher in teachers.values())


@contextmanager
def _key_of(name: str) -> Generator[None, None, None]:
    """Put the key of a teacher that has a name into the errors raised inside."""
    try:
        yield
    except ConfigError as error:
        if not name:
            raise
        raise ConfigError(re.sub(r"^teacher\b", f"teachers.{name}", str(error))) from error


def _load_teacher(
    config: TrainConfig,
    settings: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    shard: bool,
) -> Teacher:
    kind: Kind = "sampled" if config.objective == "sampled" else settings.targets
    vocab_size = load_pretrained(AutoConfig, "student", config.student).get_text_config().vocab_size
    if settings.model is not None:
        vocab_size = common_tokens(settings, tokenizer, vocab_size)
        # FSDP's low-memory loading leaves weights empty until accelerate fills those of the student.
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            model = _load_model(config, settings, settings.model, device)
        model = cast(Any, model).eval().requires_grad_(False)
        weights = model_fingerprint(model)  # before it is sharded
        if shard and all(p.is_floating_point() for p in model.parameters()):  # not if quantized
            shard_teacher(model, device)
        elif getattr(model, "hf_device_map", None) is None:  # of teacher.load
            model.to(device)
        check_lm_head(model, "teacher.model", model)
        place = checked_head(model)[0].weight.device
        if not shard and place != torch.empty(0, device=device).device:
            raise ConfigError(
                f"teacher.load: device_map puts the LM head on {place}; the loss needs it on {device}"
            )
        if "attn_implementation" not in settings.load:
            set_attention(model, config)
        embedding = cast(Tensor, model.get_input_embeddings().weight)
        vocab_size = min(vocab_size, len(checked_head(model)[0].weight), len(embedding))
        teacher = LocalTeacher(model, config, settings, kind, vocab_size, weights)
    elif settings.stored is not None:
        teacher = StoredTeacher(settings.stored, settings, config.temperature, vocab_size)
        teacher.vocab_size = common_tokens(settings, tokenizer, teacher.vocab_size, teacher.info["tokenizer"])
    else:
        assert settings.url is not None
        client = TeacherClient(
            settings.url,
            token=os.environ.get("FUSED_DISTILL_TOKEN"),
            deadline_seconds=settings.deadline_seconds,
        )
        try:
            client.wait_until_ready(min(settings.deadline_seconds, _START_SECONDS))
        except ServerError as error:
            raise ConfigError(f"teacher.url: {error}") from None
        info = client.info()
        capabilities = info.get("capabilities", [])  # a stock vLLM server has none
        # The sampled tokens' log-probabilities are in every server's answer.
        needed = {"full": "hidden_states", "student_topk": "score_ids"}.get(kind)
        if needed is not None and needed not in capabilities:
            raise ConfigError(f"teacher.targets: must be topk with this server, which has no {needed}")
        if config.temperature != 1 and "temperature" not in capabilities:
            raise ConfigError(f"temperature: must be 1 with this server, got {config.temperature}")
        vocab_size = min(vocab_size, info.get("vocab_size", vocab_size))
        vocab_size = common_tokens(settings, tokenizer, vocab_size, info.get("tokenizer_fingerprint"))
        weights = info.get("weights_fingerprint")
        if kind == "full":
            head = client.head()
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
            teacher = HiddenStateTeacher(client, head, settings, vocab_size, weights)
        else:
            teacher = ServedTeacher(
                client, config, settings, kind, vocab_size, weights, "vocab_size" in capabilities
            )
    if settings.targets != "full" and settings.k > teacher.vocab_size:
        raise ConfigError(f"teacher.k: {settings.k} is more than the {teacher.vocab_size} tokens there are")
    return teacher


def _load_model(
    config: TrainConfig, settings: TeacherConfig, name: str, device: torch.device
) -> PreTrainedModel:
    if settings.is_self:
        torch.manual_seed(config.seed)  # for the adapters of LoRA, as the student's
        return load_student(config.model_copy(update={"gradient_checkpointing": False}))
    options = settings.load | {"dtype": weights_dtype(settings.dtype, device.type)}
    load_pretrained(AutoConfig, "teacher.model", name)  # a fault of its own is not one of the options
    try:
        return load_pretrained(AutoModelForCausalLM, "teacher.model", name, **options)
    except Exception as error:  # options raise many types
        if not settings.load:
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise ConfigError(f"teacher.load: {name} cannot be loaded with {settings.load}: {reason}") from error


def check_limits(teachers: dict[str, Teacher], config: TrainConfig, length: Callable[[], int]) -> None:
    """Raise a ConfigError if a teacher does not take `length()` tokens or, a server, the settings' k."""
    for name, teacher in teachers.items():
        with _key_of(name):
            _check_limits(teacher, config, length)


def check_stores(teachers: dict[str, Teacher], data: Data, fingerprint: str | None) -> None:
    """Raise a ConfigError if a stored teacher lacks a sample of the data, whose fingerprint is given."""
    for name, teacher in teachers.items():
        if isinstance(teacher, StoredTeacher):
            with _key_of(name):
                teacher.check(data, name, fingerprint)


def _check_limits(teacher: Teacher, config: TrainConfig, length: Callable[[], int]) -> None:
    if isinstance(teacher, LocalTeacher):
        check_positions("teacher.model", teacher.model.config, config, length)
    if not isinstance(teacher, HiddenStateTeacher | ServedTeacher):
        return
    k = teacher.settings.k if teacher.settings.targets == "topk" else 0
    try:
        teacher.client.check_limits(top_logprobs=k, length=length())
    except (ValueError, ServerError) as error:
        raise ConfigError(f"teacher.url: {error}") from None
