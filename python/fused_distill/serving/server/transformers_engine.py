"""Engine on transformers: any causal language model, on any device, through `topk_logprobs`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from ... import topk_logprobs
from ...huggingface.fingerprint import model_fingerprint
from ...huggingface.lm_head import lm_head_of
from ...huggingface.loading import (
    load_causal_lm,
    load_files,
    load_tokenizer,
    require_model,
    tokenizer_fingerprint,
    weights_dtype,
)
from ..protocol.hidden_states import HiddenStates
from ..protocol.lm_head import HeadFile
from ..protocol.logprobs import TeacherLogprobs
from ..protocol.request import ScoringOptions, TokenSequence
from .engine import Results, TeacherInfo, try_engine
from .prefix_sharing import HiddenStateModel, close_in_norm

_log = logging.getLogger(__name__)


class TransformersEngine:
    """See TeacherEngine.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, for the fingerprint that clients compare. None: no fingerprint.
        name: the name that clients see. None: the model's path.
        max_length: length of the longest sequence, at most the model's positions. None: all of them.
        hidden_states: offer hidden states and the LM head. Every client can then download the head.

    Raises:
        ValueError: max_length is needed or too large, the model's logits are not those of its LM head, or it
            cannot score tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        name: str | None = None,
        max_length: int | None = None,
        hidden_states: bool = True,
    ):
        self.model = model.eval()
        self.head = lm_head_of(model)
        config = model.config.get_text_config()
        vocab_size = min(config.vocab_size, len(self.head.weight))
        self.info = TeacherInfo(
            name or model.config.name_or_path or type(model).__name__,
            vocab_size,
            longest_sequence(config, max_length),
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            weights_fingerprint=model_fingerprint(model),
        )
        self.head_file = None
        if hidden_states:
            self.info = self.info._replace(capabilities=(*self.info.capabilities, "hidden_states"))
            bias = None if self.head.bias is None else self.head.bias[:vocab_size]
            self.head_file = HeadFile(self.head._replace(weight=self.head.weight[:vocab_size], bias=bias))
        self.hidden_state_model = HiddenStateModel(
            model, vocab_size, self.info.max_length, self.head.weight.device
        )
        self._check_head()
        self.dtype, self.device = str(model.dtype).removeprefix("torch."), str(self.head.weight.device)
        try_engine(self)

    @classmethod
    def load(
        cls, name: str, device: str, dtype: str, max_length: int | None = None, hidden_states: bool = True
    ) -> TransformersEngine:
        """Load the model and the tokenizer of a local path or hub name.

        Raises:
            ImportError: transformers is missing.
            OSError, ValueError: see load_causal_lm.
        """
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise ImportError(
                "the transformers engine needs transformers: pip install 'fused-distill[trainer]'"
            ) from error
        require_model(name)
        config = load_files(AutoConfig.from_pretrained, name)
        longest_sequence(config.get_text_config(), max_length)  # before the weights
        model = load_causal_lm(name, dtype=weights_dtype(dtype, device))
        return cls(model.to(device), load_tokenizer(name), name, max_length, hidden_states)

    def _check_head(self) -> None:
        """Check that the LM head, as read from the config, gives the model's own logits."""
        tokens = (*range(min(4, self.info.vocab_size)), 0)
        rows = torch.tensor([tokens], device=self.hidden_state_model.device)
        with torch.inference_mode():
            states = self.hidden_state_model.forward_padded([TokenSequence(tokens, 1)])
            model_logits = self.model(input_ids=rows, use_cache=False).logits[0, :-1]
            fits = states.shape[-1] == self.head.weight.shape[1] and close_in_norm(
                self.head.logits(states), model_logits
            )
        if not fits:
            raise ValueError(
                "model must have logits that follow from its LM head and config, "
                f"got {type(self.model).__name__}, which computes others"
            )

    def score(self, batch: list[TokenSequence], options: ScoringOptions) -> Results:
        """See TeacherEngine. A batch that does not fit into memory is scored in halves."""
        try:
            return self._score(batch, options)
        except RuntimeError as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
        # Here the exception, which holds on to the tensors of the failed pass, is gone.
        _log.warning("out of memory for a batch of %d sequences; it runs in halves", len(batch))
        middle = len(batch) // 2
        halves = self.score(batch[:middle], options), self.score(batch[middle:], options)
        return [*halves[0], *halves[1]]  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def _score(self, batch: list[TokenSequence], options: ScoringOptions) -> Results:
        """Score a batch in one pass. The LM head runs at scored positions only."""
        lengths = np.array([s.positions for s in batch], dtype=np.int64)
        states = self.hidden_state_model.states(batch)
        if options.response == "hidden_states":
            assert self.head_file is not None  # checked by the server
            return HiddenStates(lengths, states.cpu(), self.head_file.saved().sha256).split()
        actual = [token for s in batch for token in s.tokens[s.start :]]
        query_ids = torch.tensor(actual, dtype=torch.int64, device=states.device).unsqueeze(-1)
        if options.score_count is not None:
            rows = np.concatenate([s.score_ids for s in batch if s.score_ids is not None])
            score_ids = torch.from_numpy(rows).to(states.device, torch.int64)
            query_ids = torch.cat([query_ids, score_ids], -1)
        top = topk_logprobs(
            states,
            self.head.weight,
            options.top_logprobs,
            query_ids,
            temperature=options.temperature,
            **self.head.options(),
            vocab_size=options.vocab_size or self.info.vocab_size,
        )
        assert top.actual_logprobs is not None
        query_logprobs = top.actual_logprobs.float().cpu().numpy()
        return TeacherLogprobs(
            lengths,
            top.logprobs.float().cpu().numpy(),
            top.ids.int().cpu().numpy(),
            query_logprobs[:, 0],
            None if options.score_count is None else query_logprobs[:, 1:],
        ).split()

    def close(self) -> None:
        """Remove the file of the LM head."""
        if self.head_file is not None:
            self.head_file.close()


def longest_sequence(config: Any, max_length: int | None) -> int:
    """Return max_length, or the number of positions that a text model's config names if it is None.

    Raises:
        ValueError: max_length is larger than that number, below 1, or needed because the config names none.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < 0:  # XLNet's way to say that there is no limit
        positions = None
    limit = positions if max_length is None else max_length
    if limit is None:
        raise ValueError(f"max_length must be given: the config of {config.model_type} has none")
    if limit < 1:
        raise ValueError(f"max_length must be at least 1, got {limit}")
    if positions is not None and limit > positions:
        raise ValueError(f"max_length must be at most the model's {positions} positions, got {limit}")
    return limit


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
