"""Where the teacher's distribution comes from: a model here, a server, or what was stored before."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from .. import topk_logprobs
from ..output_heads import OutputHead, output_head
from ..serving.align import align, align_hidden_states
from ..serving.client import TeacherClient
from ..serving.engine import load_tokenizer, tokenizer_fingerprint
from .config import ConfigError, TrainConfig
from .data import Batch
from .stored import StoredTeacher
from .targets import FullTargets, StudentIds, Teacher, TopKTargets


def top_ids(hidden: Tensor, head: OutputHead, k: int, mask: Tensor, temperature: float) -> TopKTargets:
    """A model's own k likeliest tokens where `mask` is True."""
    top = topk_logprobs(
        hidden,
        head.weight,
        k,
        bias=head.bias,
        mask=mask,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )
    return TopKTargets(top.logprobs, top.ids)


@dataclass
class LocalTeacher:
    """A model in this process."""

    model: Any
    config: TrainConfig

    @torch.no_grad()
    def targets(self, batch: Batch, student_ids: StudentIds) -> FullTargets | TopKTargets:
        """See Teacher."""
        wanted, head = self.config.teacher, output_head(self.model)
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        hidden = hidden.last_hidden_state[:, :-1]
        if wanted.targets == "full":
            return FullTargets(hidden, head)
        temperature = self.config.temperature
        if wanted.targets == "topk":
            return top_ids(hidden, head, wanted.k, batch.mask, temperature)
        ids = student_ids()
        found = topk_logprobs(
            hidden,
            head.weight,
            0,
            ids,
            bias=head.bias,
            mask=batch.mask,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        )
        assert found.actual_logprobs is not None
        return TopKTargets(found.actual_logprobs, ids)


class ServedTeacher:
    """A teacher server, ours or a stock vLLM's."""

    def __init__(self, client: TeacherClient, config: TrainConfig, device: torch.device):
        self.client, self.config = client, config
        self.head: OutputHead | None = None
        if config.teacher.targets == "full":
            head = client.head()
            bias = None if head.bias is None else head.bias.to(device)
            self.head = head._replace(weight=head.weight.to(device), bias=bias)

    def targets(self, batch: Batch, student_ids: StudentIds) -> FullTargets | TopKTargets:
        """See Teacher."""
        wanted, mask = self.config.teacher, batch.mask
        asked = [[*s.prompt, *s.completion] for s in batch.samples], [len(s.prompt) for s in batch.samples]
        if self.head is not None:
            weight = self.head.weight
            dtype = "float32" if weight.dtype == torch.float32 else "bfloat16"
            states = align_hidden_states(self.client.get_hidden_states(*asked, dtype=dtype), mask)
            return FullTargets(states.to(weight.dtype), self.head)
        temperature = self.config.temperature
        if wanted.targets == "topk":
            answer = self.client.get_sequence_logprobs(*asked, top_logprobs=wanted.k, temperature=temperature)
            aligned = align(answer, mask)
            return TopKTargets(aligned.logprobs, aligned.ids)
        ids = student_ids()
        chosen = ids[mask].split(mask.sum(1).tolist())
        answer = self.client.get_sequence_logprobs(
            *asked, top_logprobs=0, temperature=temperature, score_ids=[c.cpu().numpy() for c in chosen]
        )
        scores = align(answer, mask).score_logprobs
        assert scores is not None
        return TopKTargets(scores, ids)


def load_teacher(config: TrainConfig, tokenizer: Any, device: torch.device) -> Teacher:
    """The teacher that the settings name.

    Raises:
        ConfigError: its tokenizer is not the student's, or it does not fit otherwise.
    """
    wanted, fingerprint = config.teacher, tokenizer_fingerprint(tokenizer)
    if wanted.model is not None:
        own = load_tokenizer(wanted.model)
        _same_tokenizer("teacher.model", fingerprint, own and tokenizer_fingerprint(own))
        dtype = wanted.dtype
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "bfloat16"
        model: Any = AutoModelForCausalLM.from_pretrained(wanted.model, dtype=getattr(torch, dtype))
        return LocalTeacher(model.to(device).eval().requires_grad_(False), config)
    if wanted.stored is not None:
        stored = StoredTeacher(wanted.stored)
        _same_tokenizer("teacher.stored", fingerprint, stored.info["tokenizer_fingerprint"])
        return _checked_store(stored, config)
    assert wanted.url is not None
    client = TeacherClient(wanted.url, token=os.environ.get("FUSED_DISTILL_TOKEN"))
    _same_tokenizer("teacher.url", fingerprint, client.info().get("tokenizer_fingerprint"))
    return ServedTeacher(client, config, device)


def _same_tokenizer(key: str, student: str, teacher: str | None) -> None:
    """Where the teacher's is not known, its ids are taken for the student's."""
    if teacher is not None and teacher != student:
        raise ConfigError(
            f"{key}: the teacher's tokenizer gives tokens other ids than the student's. Distributions are "
            "compared id by id, so both models must share a tokenizer"
        )


def _checked_store(stored: StoredTeacher, config: TrainConfig) -> StoredTeacher:
    for name, want in (("k", config.teacher.k), ("temperature", config.temperature)):
        if stored.info[name] != want:
            raise ConfigError(f"teacher.stored: it was written with {name} {stored.info[name]}, not {want}")
    return stored
