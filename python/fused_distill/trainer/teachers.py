"""Sources of the teacher's distribution: a model in this process, a server, or a store."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..huggingface.lm_head import LMHeadParams, decoder_of, lm_head_of
from ..huggingface.loading import load_tokenizer, tokenizer_fingerprint, weights_dtype
from ..serving.client.align import align, align_hidden_states
from ..serving.client.client import TeacherClient
from .config import ConfigError, TeacherConfig
from .data import Batch
from .stored import StoredTeacher
from .student import load_pretrained
from .targets import FullTargets, Targets, Teacher, TopKTargets, topk_targets


@dataclass
class LocalTeacher:
    """A model in this process."""

    model: PreTrainedModel
    vocab_size: int
    temperature: float
    k: int | None  # None: targets over the full vocabulary

    @torch.no_grad()
    def targets(self, batch: Batch, student_ids: Tensor | None) -> Targets:
        """See Teacher."""
        head, decoder = lm_head_of(self.model), decoder_of(self.model)
        output = decoder(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        hidden: Tensor = output.last_hidden_state[:, :-1]
        if self.k is None:
            return FullTargets(hidden, head)
        options = self.k, self.temperature, self.vocab_size
        return topk_targets(hidden, head, batch.mask, *options, student_ids)


@dataclass
class HiddenStateTeacher:
    """A teacher server that returns hidden states, with a local copy of its LM head."""

    client: TeacherClient
    head: LMHeadParams
    vocab_size: int

    def targets(self, batch: Batch, student_ids: Tensor | None) -> FullTargets:
        """See Teacher; student_ids must be None."""
        dtype = "float32" if self.head.weight.dtype == torch.float32 else "bfloat16"
        hidden = self.client.get_hidden_states(*_sequences(batch), dtype=dtype)
        states = align_hidden_states(hidden, batch.mask)
        return FullTargets(states.to(self.head.weight.dtype), self.head)


@dataclass
class ServedTeacher:
    """A teacher server that returns log-probabilities, ours or a stock vLLM server."""

    client: TeacherClient
    vocab_size: int
    temperature: float
    k: int
    normalizes: bool  # over vocab_size tokens; else over all rows of its own LM head

    def targets(self, batch: Batch, student_ids: Tensor | None) -> TopKTargets:
        """See Teacher."""
        score_ids = None
        if student_ids is not None:
            per_sample = student_ids[batch.mask].split(batch.mask.sum(1).tolist())
            score_ids = [ids.cpu().numpy() for ids in per_sample]
        answer = self.client.get_sequence_logprobs(
            *_sequences(batch),
            top_logprobs=self.k if student_ids is None else 0,
            score_ids=score_ids,
            temperature=self.temperature,
            vocab_size=self.vocab_size if self.normalizes else None,
        )
        aligned = align(answer, batch.mask)
        if student_ids is not None:
            assert aligned.score_logprobs is not None
            return TopKTargets(aligned.score_logprobs, student_ids)
        # Tokens without a row in the student's LM head belong to the tail.
        beyond = aligned.ids >= self.vocab_size
        return TopKTargets(aligned.logprobs.masked_fill(beyond, -torch.inf), aligned.ids)


def _sequences(batch: Batch) -> tuple[list[list[int]], list[int]]:
    """Return the tokens and the prompt lengths of a batch."""
    return [s.tokens for s in batch.samples], [len(s.prompt) for s in batch.samples]


def load_teacher(
    config: TeacherConfig,
    temperature: float,  # of the loss
    tokenizer: PreTrainedTokenizerBase,  # the student's
    vocab_size: int,  # rows of the student's LM head
    device: torch.device,
) -> Teacher:
    """Load the teacher that the settings name.

    Raises:
        ConfigError: the teacher cannot be loaded, has another tokenizer, or lacks what the settings need.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    if config.model is not None:
        own_tokenizer = load_tokenizer(config.model)
        own_fingerprint = None if own_tokenizer is None else tokenizer_fingerprint(own_tokenizer)
        _check_tokenizer("teacher.model", fingerprint, own_fingerprint)
        dtype = weights_dtype(config.dtype, device.type)
        # FSDP's low-memory loading leaves weights empty until FSDP fills them; it does not wrap the teacher.
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            model = load_pretrained(AutoModelForCausalLM, "teacher.model", config.model, dtype=dtype)
        model.to(device).eval().requires_grad_(False)
        k = None if config.targets == "full" else config.k
        teacher = LocalTeacher(model, min(vocab_size, len(lm_head_of(model).weight)), temperature, k)
    elif config.stored is not None:
        teacher = StoredTeacher(config.stored, config.k, temperature, vocab_size)
        _check_tokenizer("teacher.stored", fingerprint, teacher.info["tokenizer_fingerprint"])
    else:
        assert config.url is not None
        client = TeacherClient(config.url, token=os.environ.get("FUSED_DISTILL_TOKEN"))
        info = client.info()
        _check_tokenizer("teacher.url", fingerprint, info.get("tokenizer_fingerprint"))
        capabilities = info.get("capabilities", [])
        _check_capabilities(config.targets, temperature, capabilities)
        vocab_size = min(vocab_size, info.get("vocab_size", vocab_size))
        if config.targets == "full":
            head = client.head()
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
            teacher = HiddenStateTeacher(client, head, vocab_size)
        else:
            normalizes = "vocab_size" in capabilities
            teacher = ServedTeacher(client, vocab_size, temperature, config.k, normalizes)
    if config.targets != "full" and config.k > teacher.vocab_size:
        raise ConfigError(f"teacher.k: {config.k} is more than the {teacher.vocab_size} tokens there are")
    return teacher


def _check_capabilities(targets: str, temperature: float, capabilities: list[str]) -> None:
    """Raise a ConfigError if the server lacks a needed capability; a stock vLLM server has none."""
    needed = {"full": "hidden_states", "student_topk": "score_ids", "topk": None}[targets]
    if needed is not None and needed not in capabilities:
        raise ConfigError(f"teacher.targets: must be topk with this server, which has no {needed}")
    if temperature != 1 and "temperature" not in capabilities:
        raise ConfigError(f"temperature: must be 1 with this server, got {temperature}")


def _check_tokenizer(key: str, student: str, teacher: str | None) -> None:
    """Raise a ConfigError if the tokenizers differ; if the teacher's is unknown, assume it matches."""
    if teacher is not None and teacher != student:
        raise ConfigError(
            f"{key}: the teacher's tokenizer gives tokens other ids than the student's. Distributions are "
            "compared id by id, so both models must share a tokenizer"
        )
