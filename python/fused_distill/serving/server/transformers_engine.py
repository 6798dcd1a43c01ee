"""What scores sequences: one small interface, and the engine on transformers."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import topk_logprobs
from ...huggingface.lm_head import lm_head_of
from ...huggingface.loading import load_tokenizer, tokenizer_fingerprint, weights_dtype
from ..protocol.hidden_states import HiddenStates
from ..protocol.lm_head import HeadFile
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import ScoringOptions, TokenSequence
from .prefix_sharing import Decoder, agree

_log = logging.getLogger(__name__)

Result = TeacherLogprobs | HiddenStates
Results = list[TeacherLogprobs] | list[HiddenStates]
Capability = Literal["temperature", "score_ids", "vocab_size", "hidden_states"]
LOGPROBS: tuple[Capability, ...] = ("temperature", "score_ids", "vocab_size")


class TeacherInfo(NamedTuple):
    """What a client must know of a teacher."""

    model: str
    vocab_size: int
    max_length: int
    tokenizer_fingerprint: str | None
    capabilities: tuple[Capability, ...] = LOGPROBS  # beyond top log-probabilities


class TeacherEngine(Protocol):
    """Scores a batch at a time, called from one thread only; `head_file` may be read from any."""

    info: TeacherInfo

    @property
    def head_file(self) -> HeadFile | None:
        """The head, None without the capability "hidden_states"."""
        ...

    def score(self, batch: list[TokenSequence], execution: ScoringOptions) -> Results:
        """For each sequence what `execution.response` names."""
        ...

    def close(self) -> None:
        """Give up processes and files."""
        ...


class TransformersEngine:
    """Any causal language model of transformers, on any device, through `topk_logprobs`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        name: str | None = None,
        max_length: int | None = None,
        hidden_states: bool = True,
    ):
        """Raises ValueError where max_length is needed, or the model's logits are not those of its head.

        With hidden_states, whoever may ask the server may also download the head.
        """
        self.model = model.eval()
        self.head = lm_head_of(model)
        config = model.config.get_text_config()
        max_length = max_length or getattr(config, "max_position_embeddings", None)
        if max_length is None:
            raise ValueError(f"max_length must be given for {type(model).__name__}, whose config names none")
        self.info = TeacherInfo(
            name or model.config.name_or_path or type(model).__name__,
            min(config.vocab_size, len(self.head.weight)),
            max_length,
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            (*LOGPROBS, "hidden_states") if hidden_states else LOGPROBS,
        )
        vocabulary = slice(self.info.vocab_size)
        bias = None if self.head.bias is None else self.head.bias[vocabulary]
        head = self.head._replace(weight=self.head.weight[vocabulary], bias=bias)
        self.head_file = HeadFile(head) if hidden_states else None
        self.decoder = Decoder(model, self.info.vocab_size, max_length, self.head.weight.device)
        self._check_head()

    @classmethod
    def load(
        cls,
        name: str,
        device: str,
        dtype: str,
        max_length: int | None = None,
        hidden_states: bool = True,
    ) -> TransformersEngine:
        """From a local path or a hub name.

        Raises:
            ImportError: without transformers, naming the extra.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ImportError(
                "the transformers engine needs transformers: pip install 'fused-distill[trainer]'"
            ) from error
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=weights_dtype(dtype, device))
        return cls(model.to(device), load_tokenizer(name), name, max_length, hidden_states)

    def _check_head(self) -> None:
        """The head as read from the config gives the model's own logits; a family may compute others."""
        tokens = [*range(min(4, self.info.vocab_size)), 0]
        rows = torch.tensor([tokens], device=self.decoder.device)
        with torch.inference_mode():
            logits = self.head.logits(self.decoder.apart([TokenSequence(tuple(tokens), 1)]))
            own = self.model(input_ids=rows, use_cache=False).logits[0, :-1]
        if not agree(logits, own):
            raise ValueError(
                "model must have logits that follow from its head and config, "
                f"got {type(self.model).__name__}, whose own are different"
            )

    def score(self, batch: list[TokenSequence], execution: ScoringOptions) -> Results:
        """The model's hidden states; the head at scored positions only."""
        with torch.inference_mode():
            states = self.decoder.states(batch)
            if execution.response == "hidden_states":
                return self._hidden_states(states, batch).split()
            return self._logprobs(states, batch, execution).split()

    def close(self) -> None:
        """Remove the head's file."""
        if self.head_file is not None:
            self.head_file.close()

    def _hidden_states(self, states: Tensor, batch: list[TokenSequence]) -> HiddenStates:
        assert self.head_file is not None  # the server asks for nothing that is no capability
        return HiddenStates(_lengths(batch), states.cpu(), self.head_file.saved().sha256)

    def _logprobs(
        self, states: Tensor, batch: list[TokenSequence], execution: ScoringOptions
    ) -> TeacherLogprobs:
        device = states.device
        actual = [token for s in batch for token in s.tokens[s.start :]]
        asked = torch.tensor(actual, dtype=torch.int64, device=device).unsqueeze(-1)
        if execution.score_count is not None:
            rows = [row for s in batch for row in s.score_ids or ()]
            chosen = torch.tensor(rows, dtype=torch.int64, device=device)
            asked = torch.cat([asked, chosen.reshape(len(asked), execution.score_count)], -1)
        top = topk_logprobs(
            states,
            self.head.weight,
            execution.top_logprobs,
            asked,
            temperature=execution.temperature,
            **self.head.options(),
            vocab_size=execution.vocab_size or self.info.vocab_size,
        )
        assert top.actual_logprobs is not None
        asked_logprobs = top.actual_logprobs.float().cpu().numpy()
        return TeacherLogprobs(
            _lengths(batch),
            top.logprobs.float().cpu().numpy(),
            top.ids.int().cpu().numpy(),
            asked_logprobs[:, 0],
            None if execution.score_count is None else asked_logprobs[:, 1:],
        )


def _lengths(batch: list[TokenSequence]) -> NDArray[np.int64]:
    return np.array([s.positions for s in batch], dtype=np.int64)
