"""What scores sequences: one small interface, and the engine on transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import topk_logprobs
from ..output_heads import output_head
from .wire import Answer, first_scored, scored_positions


@dataclass(frozen=True)
class Sequence:
    """One sequence to be scored from token `start` on."""

    tokens: tuple[int, ...]
    prompt_length: int
    score_ids: tuple[tuple[int, ...], ...] | None = None  # M per position

    @property
    def start(self) -> int:
        """The first token with a log-probability."""
        return first_scored(self.prompt_length)

    @property
    def positions(self) -> int:
        """Tokens that are scored."""
        return scored_positions(len(self.tokens), self.prompt_length)


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

    def __init__(
        self, model: Any, tokenizer: Any | None = None, name: str | None = None, max_length: int | None = None
    ):
        """Raises ValueError where max_length is needed, or the model's logits are not those of its head."""
        self.model = model.eval()
        self.head = output_head(model)
        config = model.config.get_text_config()
        max_length = max_length or getattr(config, "max_position_embeddings", None)
        if max_length is None:
            raise ValueError(f"max_length must be given for {type(model).__name__}, whose config names none")
        self.info = TeacherInfo(
            name or model.config.name_or_path or type(model).__name__,
            min(config.vocab_size, len(self.head.weight)),
            max_length,
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        )
        self._check_head()

    @classmethod
    def load(cls, name: str, device: str, dtype: str, max_length: int | None = None) -> TransformersEngine:
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):  # a model may come without one
            tokenizer = None
        return cls(model.to(device), tokenizer, name, max_length)

    def _hidden(self, tokens: Tensor, attention: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state

    def _check_head(self) -> None:
        """The head as read from the config gives the model's own logits; a family may compute others."""
        tokens = torch.arange(min(4, self.info.vocab_size), device=self.head.weight.device).unsqueeze(0)
        ones = torch.ones_like(tokens)
        with torch.inference_mode():
            logits = self.head.logits(self._hidden(tokens, ones)).float()
            own = self.model(input_ids=tokens, attention_mask=ones, use_cache=False).logits.float()
        if logits.shape != own.shape or not torch.allclose(logits, own, rtol=0.05, atol=0.05):
            raise ValueError(
                "model must have logits that follow from its head and config, "
                f"got {type(self.model).__name__}, whose own are different"
            )

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
            hidden = self._hidden(tokens, attention)
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
