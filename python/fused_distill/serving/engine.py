"""What scores sequences: one small interface, and the engine on transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .. import topk_logprobs
from ..output_heads import output_head
from .wire import Answer


@dataclass(frozen=True)
class Sequence:
    """One sequence to be scored from token `start` on."""

    tokens: tuple[int, ...]
    prompt_length: int
    score_ids: tuple[tuple[int, ...], ...] | None = None  # M per position

    @property
    def start(self) -> int:
        """The first token with a log-probability."""
        return max(self.prompt_length, 1)

    @property
    def positions(self) -> int:
        """Tokens that are scored."""
        return max(len(self.tokens) - self.start, 0)


class Execution(NamedTuple):
    """What sequences of one batch share."""

    top_logprobs: int  # K
    score_count: int | None  # M; None: no score_logprobs
    temperature: float


class TeacherInfo(NamedTuple):
    """What a client must know of a teacher."""

    model: str
    vocab_size: int
    max_length: int
    tokenizer_fingerprint: str | None


class TeacherEngine(Protocol):
    """Scores a batch at a time, called from one thread only."""

    info: TeacherInfo

    def score(self, batch: list[Sequence], execution: Execution) -> list[Answer]:
        """One answer for each sequence."""
        ...


class TransformersEngine:
    """Any causal language model of transformers, on any device, through `topk_logprobs`."""

    def __init__(self, model: Any, tokenizer: Any | None = None, name: str | None = None):
        self.model = model.eval()
        self.head = output_head(model)
        config = model.config.get_text_config()
        self.info = TeacherInfo(
            name or model.config.name_or_path or type(model).__name__,
            min(config.vocab_size, len(self.head.weight)),
            config.max_position_embeddings,
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        )

    @classmethod
    def load(cls, name: str, device: str, dtype: str) -> TransformersEngine:
        """From a local path or a hub name.

        Raises:
            ImportError: without transformers, naming the extra.
        """
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "the transformers engine needs transformers: pip install 'fused-distill[trainer]'"
            ) from error
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        return cls(model.to(device), AutoTokenizer.from_pretrained(name), name)

    def score(self, batch: list[Sequence], execution: Execution) -> list[Answer]:
        """One forward pass of the whole batch, right-padded; the head at scored positions only."""
        device = self.head.weight.device
        tokens = pad_sequence([torch.tensor(s.tokens) for s in batch], batch_first=True).to(device)
        lengths = torch.tensor([len(s.tokens) for s in batch], device=device)
        index = torch.arange(tokens.shape[1], device=device)
        starts = torch.tensor([s.start for s in batch], device=device)
        scored = (index >= starts.unsqueeze(1)) & (index < lengths.unsqueeze(1))  # tokens with a predecessor
        with torch.inference_mode():
            attention = (index < lengths.unsqueeze(1)).long()
            hidden = self.model.get_decoder()(input_ids=tokens, attention_mask=attention).last_hidden_state
            asked = tokens[scored].unsqueeze(-1)
            if execution.score_count is not None:
                rows = [row for s in batch for row in s.score_ids or ()]
                chosen = torch.tensor(rows, dtype=torch.int64, device=device)
                asked = torch.cat([asked, chosen.reshape(len(asked), execution.score_count)], -1)
            top = topk_logprobs(
                hidden[:, :-1][scored[:, 1:]],
                self.head.weight,
                execution.top_logprobs,
                asked,
                bias=self.head.bias,
                temperature=execution.temperature,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                vocab_size=self.info.vocab_size,
            )
        assert top.actual_logprobs is not None
        asked_logprobs = top.actual_logprobs.float().cpu().numpy()
        return Answer(
            np.array([s.positions for s in batch], dtype=np.int64),
            top.logprobs.float().cpu().numpy(),
            top.ids.int().cpu().numpy(),
            asked_logprobs[:, 0],
            None if execution.score_count is None else asked_logprobs[:, 1:],
        ).split()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers that give a token the same id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
