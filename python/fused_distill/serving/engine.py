"""What scores sequences: one small interface, and the engine on transformers."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import topk_logprobs
from ..output_heads import output_head
from .forward import scored_states, scored_states_shared, sharing_saves
from .head import HeadFile
from .hidden_wire import HiddenStates
from .sequences import Execution, Sequence
from .wire import Answer

Result = Answer | HiddenStates
Results = list[Answer] | list[HiddenStates]
Capability = Literal["temperature", "score_ids", "hidden_states"]


class TeacherInfo(NamedTuple):
    """What a client must know of a teacher."""

    model: str
    vocab_size: int
    max_length: int
    tokenizer_fingerprint: str | None
    capabilities: tuple[Capability, ...] = ("temperature", "score_ids")  # beyond top log-probabilities


class TeacherEngine(Protocol):
    """Scores a batch at a time, called from one thread only; `head_file` may be read from any."""

    info: TeacherInfo

    @property
    def head_file(self) -> HeadFile | None:
        """The head, None without the capability "hidden_states"."""
        ...

    def score(self, batch: list[Sequence], execution: Execution) -> Results:
        """For each sequence what `execution.response` names."""
        ...

    def close(self) -> None:
        """Give up processes and files."""
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
            ("temperature", "score_ids", "hidden_states"),
        )
        vocabulary = slice(self.info.vocab_size)
        bias = None if self.head.bias is None else self.head.bias[vocabulary]
        self.head_file = HeadFile(self.head._replace(weight=self.head.weight[vocabulary], bias=bias))
        self._check_head()
        self.shares_prompts = self._sharing_works()

    @classmethod
    def load(cls, name: str, device: str, dtype: str, max_length: int | None = None) -> TransformersEngine:
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
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        return cls(model.to(device), load_tokenizer(name), name, max_length)

    def _check_head(self) -> None:
        """The head as read from the config gives the model's own logits; a family may compute others."""
        tokens = list(range(min(4, self.info.vocab_size)))
        device = self.head.weight.device
        with torch.inference_mode():
            states = scored_states(self.model.get_decoder(), [Sequence((*tokens, 0), 1)], device)
            logits = self.head.logits(states).float()
            rows = torch.tensor([tokens], device=device)
            own = self.model(input_ids=rows, use_cache=False).logits[0].float()
        if logits.shape != own.shape or not torch.allclose(logits, own, rtol=0.05, atol=0.05):
            raise ValueError(
                "model must have logits that follow from its head and config, "
                f"got {type(self.model).__name__}, whose own are different"
            )

    def _sharing_works(self) -> bool:
        """Two passes over a cache give what one pass gives; a family may keep none, or another kind."""
        ids = [i % self.info.vocab_size for i in range(6)]
        batch = [Sequence((*ids[:3], *ids[i:]), 3) for i in range(2)] + [Sequence((*ids[:2], *ids), 2)]
        decoder, device = self.model.get_decoder(), self.head.weight.device
        with torch.inference_mode():
            apart = scored_states(decoder, batch, device)
            try:
                shared = scored_states_shared(decoder, batch, device)
            except Exception:  # each family without such a cache fails in its own way
                return False
        return torch.allclose(shared, apart, rtol=0.05, atol=0.05)

    def score(self, batch: list[Sequence], execution: Execution) -> Results:
        """One forward pass, two where prompts repeat; the head at scored positions only."""
        shared = self.shares_prompts and sharing_saves(batch)
        device, decoder = self.head.weight.device, self.model.get_decoder()
        with torch.inference_mode():
            states = (scored_states_shared if shared else scored_states)(decoder, batch, device)
            if execution.response == "hidden_states":
                return self._hidden_states(states, batch).split()
            return self._logprobs(states, batch, execution).split()

    def close(self) -> None:
        """Remove the head's file."""
        self.head_file.close()

    def _hidden_states(self, states: Tensor, batch: list[Sequence]) -> HiddenStates:
        return HiddenStates(_lengths(batch), states.cpu(), self.head_file.saved().sha256)

    def _logprobs(self, states: Tensor, batch: list[Sequence], execution: Execution) -> Answer:
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
            bias=self.head.bias,
            temperature=execution.temperature,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            vocab_size=self.info.vocab_size,
        )
        assert top.actual_logprobs is not None
        asked_logprobs = top.actual_logprobs.float().cpu().numpy()
        return Answer(
            _lengths(batch),
            top.logprobs.float().cpu().numpy(),
            top.ids.int().cpu().numpy(),
            asked_logprobs[:, 0],
            None if execution.score_count is None else asked_logprobs[:, 1:],
        )


def _lengths(batch: list[Sequence]) -> NDArray[np.int64]:
    return np.array([s.positions for s in batch], dtype=np.int64)


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a local path or hub name; None where a model comes without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers that give a token the same id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
