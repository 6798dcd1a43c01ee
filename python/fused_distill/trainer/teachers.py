"""Where the teacher's distribution comes from: a model here, a server, or what was stored before."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..huggingface.lm_head import LMHeadParams, decoder_of, lm_head_of
from ..huggingface.loading import load_tokenizer, tokenizer_fingerprint, weights_dtype
from ..serving.client.align import align, align_hidden_states
from ..serving.client.client import TeacherClient
from .config import ConfigError, TrainConfig
from .data import Batch
from .stored import StoredTeacher
from .student import pretrained
from .targets import FullTargets, Teacher, TopKTargets, topk_targets


@dataclass
class LocalTeacher:
    """A model in this process."""

    model: Any
    config: TrainConfig
    vocab_size: int

    @torch.no_grad()
    def targets(self, batch: Batch, student_ids: Tensor | None) -> FullTargets | TopKTargets:
        """See Teacher."""
        wanted, head = self.config.teacher.targets, lm_head_of(self.model)
        decoder = decoder_of(self.model)
        output = decoder(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        hidden: Tensor = output.last_hidden_state[:, :-1]
        if wanted == "full":
            return FullTargets(hidden, head)
        return topk_targets(hidden, head, batch, self.config, self.vocab_size, student_ids)


@dataclass
class ServedTeacher:
    """A teacher server, ours or a stock vLLM's, or what was stored of one."""

    client: Any  # a TeacherClient; for targets "topk" also a StoredTeacher
    config: TrainConfig
    vocab_size: int
    head: LMHeadParams | None = None  # for targets "full"
    normalises: bool = False  # over vocab_size tokens, else over all rows of its own head

    def targets(self, batch: Batch, student_ids: Tensor | None) -> FullTargets | TopKTargets:
        """See Teacher."""
        wanted, mask = self.config.teacher, batch.mask
        asked = [s.tokens for s in batch.samples], [len(s.prompt) for s in batch.samples]
        if self.head is not None:
            dtype = "float32" if self.head.weight.dtype == torch.float32 else "bfloat16"
            states = align_hidden_states(self.client.get_hidden_states(*asked, dtype=dtype), mask)
            return FullTargets(states.to(self.head.weight.dtype), self.head)
        how: dict[str, Any] = {"temperature": self.config.temperature}
        if self.normalises:
            how["vocab_size"] = self.vocab_size
        if student_ids is None:
            answer = self.client.get_sequence_logprobs(*asked, top_logprobs=wanted.k, **how)
            logprobs, ids, *_ = align(answer, mask)
            # Tokens that the student's head has no row for belong to the rest.
            return TopKTargets(logprobs.masked_fill(ids >= self.vocab_size, -torch.inf), ids)
        chosen = [rows.cpu().numpy() for rows in student_ids[mask].split(mask.sum(1).tolist())]
        answer = self.client.get_sequence_logprobs(*asked, top_logprobs=0, score_ids=chosen, **how)
        scores = align(answer, mask).score_logprobs
        assert scores is not None
        return TopKTargets(scores, student_ids)


def load_teacher(config: TrainConfig, tokenizer: Any, device: torch.device) -> Teacher:
    """The teacher that the settings name.

    Raises:
        ConfigError: its tokenizer is not the student's, or it does not fit otherwise.
    """
    wanted, fingerprint = config.teacher, tokenizer_fingerprint(tokenizer)
    vocab_size: int = pretrained(AutoConfig, "student", config.student).get_text_config().vocab_size
    if wanted.model is not None:
        own = load_tokenizer(wanted.model)
        _same_tokenizer("teacher.model", fingerprint, own and tokenizer_fingerprint(own))
        dtype = weights_dtype(wanted.dtype, device.type)
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):  # which is for what FSDP then fills
            model = pretrained(AutoModelForCausalLM, "teacher.model", wanted.model, dtype=dtype)
        model.to(device).eval().requires_grad_(False)
        teacher = LocalTeacher(model, config, min(vocab_size, len(lm_head_of(model).weight)))
    elif wanted.stored is not None:
        stored = StoredTeacher(wanted.stored)
        _same_tokenizer("teacher.stored", fingerprint, stored.info["tokenizer_fingerprint"])
        stored.check(wanted.k, config.temperature)
        teacher = ServedTeacher(stored, config, vocab_size)
    else:
        assert wanted.url is not None
        client = TeacherClient(wanted.url, token=os.environ.get("FUSED_DISTILL_TOKEN"))
        info = client.info()
        _same_tokenizer("teacher.url", fingerprint, info.get("tokenizer_fingerprint"))
        capabilities = info.get("capabilities", [])
        _check_capabilities(config, capabilities)
        head = client.head() if wanted.targets == "full" else None
        if head is not None:
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
        vocab_size = min(vocab_size, info.get("vocab_size", vocab_size))
        teacher = ServedTeacher(client, config, vocab_size, head, "vocab_size" in capabilities)
    if wanted.targets != "full" and wanted.k > teacher.vocab_size:
        raise ConfigError(f"teacher.k: {wanted.k} is more than the {teacher.vocab_size} tokens there are")
    return teacher


def _same_tokenizer(key: str, student: str, teacher: str | None) -> None:
    """Where the teacher's is not known, its ids are taken for the student's."""
    if teacher is not None and teacher != student:
        raise ConfigError(
            f"{key}: the teacher's tokenizer gives tokens other ids than the student's. Distributions are "
            "compared id by id, so both models must share a tokenizer"
        )


def _check_capabilities(config: TrainConfig, capabilities: list[str]) -> None:
    """A stock vLLM server has none of these."""
    targets = config.teacher.targets
    needed = {"full": "hidden_states", "student_topk": "score_ids", "topk": None}[targets]
    if needed is not None and needed not in capabilities:
        raise ConfigError(f"teacher.targets: must be topk with this server, which has no {needed}")
    if config.temperature != 1 and "temperature" not in capabilities:
        raise ConfigError(f"temperature: must be 1 with this server, got {config.temperature}")
