"""Hidden states before the scored tokens of a batch; a prompt shared by several sequences runs once."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...huggingface.lm_head import decoder_of
from ..protocol.request import TokenSequence

_log = logging.getLogger(__name__)

# Config fields with the number of tokens that a layer attends to.
_WINDOW_FIELDS = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "window_size"),
    *("attention_chunk_size", "local_attention"),
)
_LONGEST_TRIAL = {"cpu": 520}  # tokens of a trial at construction, by the type of the device
# Between two passes of a model that is right. In half precision experts may be chosen differently.
_ROUNDINGS = 32


class HiddenStateModel:
    """A transformers causal language model without its LM head.

    Args:
        model: the model, with at least max_length positions.
        vocab_size: the trials at construction use ids below it.
        max_length: length of the longest sequence.
        device: device of the model's input.

    Raises:
        ValueError: the model gives no hidden states, or they depend on later tokens or on what it ran before.
    """

    def __init__(self, model: Any, vocab_size: int, max_length: int, device: torch.device):
        self.decoder = decoder_of(model)
        self.vocab_size, self.max_length, self.device = vocab_size, max_length, device
        config = model.config.get_text_config()
        rope_types = _rope_types(config)
        if "dynamic" in rope_types:
            raise ValueError(
                "model must have positions that do not depend on what it ran before, got dynamic rope scaling"
            )
        # With long rope, the longest sequence of a batch decides the factors of all. Sparse attention with an
        # index may choose padding.
        index_topk = getattr(config, "index_topk", None) or max_length
        self.one_by_one = "longrope" in rope_types or index_topk < max_length
        try:
            self._check_causal()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"model must give last hidden states, got {type(model).__name__}") from error
        if not self.one_by_one and not self._padding_works():
            _log.warning("sequences run one by one: padding changes this model's hidden states")
            self.one_by_one = True
        self.longest_shared = max_length
        self.shares_prompts = not self.one_by_one and self._sharing_works(config)

    def states(self, batch: list[TokenSequence]) -> Tensor:
        """Return the (P, D) last hidden states before each scored token, sequence by sequence."""
        if self.one_by_one:
            return torch.cat([self.forward_padded([sequence]) for sequence in batch])
        if self.shares_prompts and self.sharing_saves(batch):
            try:
                return self.forward_shared_prefix(batch)
            except torch.OutOfMemoryError:
                _log.warning("out of memory for the cache of shared prompts; the batch runs without sharing")
        return self.forward_padded(batch)

    @torch.inference_mode()
    def forward_padded(self, batch: list[TokenSequence]) -> Tensor:
        """Return the states by one pass over all sequences, right-padded."""
        tokens = pad_sequence([torch.tensor(s.tokens) for s in batch], batch_first=True).to(self.device)
        lengths = torch.tensor([len(s.tokens) for s in batch], device=self.device).unsqueeze(1)
        starts = torch.tensor([s.start for s in batch], device=self.device).unsqueeze(1)
        index = torch.arange(tokens.shape[1], device=self.device)
        output = self.decoder(input_ids=tokens, attention_mask=(index < lengths).long(), use_cache=False)
        return output.last_hidden_state[(index >= starts - 1) & (index < lengths - 1)]

    def sharing_saves(self, batch: list[TokenSequence]) -> bool:
        """Return True if sharing runs fewer tokens, padding included, within the length that was tried."""
        prompts = {s.tokens[: s.start] for s in batch}
        longest, longest_rest = max(map(len, prompts)), max(len(s.tokens) - s.start for s in batch)
        shared_tokens = len(prompts) * longest + len(batch) * longest_rest
        padded_tokens = len(batch) * max(len(s.tokens) for s in batch)
        return shared_tokens < padded_tokens and longest + longest_rest <= self.longest_shared

    @torch.inference_mode()
    def forward_shared_prefix(self, batch: list[TokenSequence]) -> Tensor:
        """Return the states by two passes: distinct prompts, left-padded, then completions on their cache.

        This saves compute, not memory: the cache is expanded to one copy of its prompt per sequence.
        """
        prompts = list(dict.fromkeys(s.tokens[: s.start] for s in batch))
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(p) for p in prompts], device=self.device).unsqueeze(1)
        index = torch.arange(longest, device=self.device)
        attention = (index >= padding).long()
        rows = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        positions = (index - padding).clamp_min(0)
        first = self.decoder(input_ids=rows, attention_mask=attention, position_ids=positions, use_cache=True)

        row_of = {prompt: i for i, prompt in enumerate(prompts)}
        prompt_row = torch.tensor([row_of[s.tokens[: s.start]] for s in batch], device=self.device)
        states = first.last_hidden_state[prompt_row, -1:]  # (B, 1, D)
        # The state at a sequence's last token predicts nothing that is scored.
        rests = [torch.tensor(s.tokens[s.start : -1], dtype=torch.int64) for s in batch]
        counts = torch.tensor([s.positions for s in batch], device=self.device).unsqueeze(1)
        longest_rest = max(map(len, rests))
        if longest_rest:
            cache = first.past_key_values
            cache.batch_select_indices(prompt_row)
            index = torch.arange(longest_rest, device=self.device)
            real = index < counts - 1
            second = self.decoder(
                input_ids=pad_sequence(rests, batch_first=True).to(self.device),
                attention_mask=torch.cat([attention[prompt_row], real.long()], 1),
                position_ids=torch.where(real, index + longest - padding[prompt_row], 0),
                past_key_values=cache,
                use_cache=True,
            )
            states = torch.cat([states, second.last_hidden_state], 1)
        return states[torch.arange(states.shape[1], device=self.device) < counts]

    def _trial(self, length: int, prompt_length: int, first: int = 0) -> TokenSequence:
        """Return a sequence of the ids from `first` on."""
        return TokenSequence(tuple((first + i) % self.vocab_size for i in range(length)), prompt_length)

    def _check_causal(self) -> None:
        """Check that no state changes with a later token."""
        tokens = self._trial(min(8, self.max_length), 1).tokens
        changed = *tokens[:-1], (tokens[-1] + 1) % self.vocab_size
        states, others = (self.forward_padded([TokenSequence(ids, 1)]) for ids in (tokens, changed))
        if not close_in_norm(others, states, 1e-4, _ROUNDINGS):
            raise ValueError(
                "model must be causal, got one whose hidden states change with later tokens; "
                "some encoders need is_decoder in their config"
            )

    def _padding_works(self) -> bool:
        """Return True if a padded batch has the states of its sequences alone."""
        batch = [self._trial(min(length, self.max_length), 1, length) for length in (8, 3, 5)]
        alone = torch.cat([self.forward_padded([s]) for s in batch])
        return close_in_norm(self.forward_padded(batch), alone, roundings=_ROUNDINGS)

    def _sharing_works(self, config: Any) -> bool:
        """Return True if two passes over a cache give the states of one pass.

        Prompts are shared in longer sequences than a layer's window only if this was tried, too.
        """
        scaled = getattr(config, "attn_temperature_tuning", None)
        if scaled and getattr(config, "floor_scale", 0) < self.max_length:
            _log.warning(
                "prompts are not shared: this model scales attention by positions that count padding"
            )
            return False
        trials = [[self._trial(9, 3), self._trial(8, 3), self._trial(8, 2, 1)]]
        window = _smallest_window(config)
        if window < self.max_length:
            if window + 6 <= min(_LONGEST_TRIAL.get(self.device.type, 4200), self.max_length):
                trials.append([self._trial(window + 4, window + 1), self._trial(8, 3)])
            else:
                self.longest_shared = window
        try:
            if all(close_in_norm(self.forward_shared_prefix(t), self.forward_padded(t)) for t in trials):
                return True
            reason = "this model's cache gives other hidden states"
        except Exception as error:  # every family without such a cache fails in its own way
            reason = f"{type(error).__name__}: {error}"
        _log.warning("prompts are not shared: %s", reason)
        return False


def close_in_norm(a: Tensor, b: Tensor, tolerance: float = 1e-3, roundings: int = 8) -> bool:
    """Return True if a and b are not finite in the same places and differ elsewhere by rounding only.

    The norm of the difference, over all finite elements together, may be `tolerance` times that of b, or
    in low precision `roundings` times the dtype's.
    """
    if a.shape != b.shape:
        return False
    finite = b.isfinite()
    if not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return False
    tolerance = max(tolerance, roundings * torch.finfo(a.dtype).eps)
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= tolerance * b.norm())


def _rope_types(config: Any) -> set[str]:
    """Return the types of rotary positions, which some families configure per kind of layer."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return {section.get("rope_type", "") for section in (rope, *rope.values()) if isinstance(section, dict)}


def _smallest_window(config: Any) -> int:
    """Return the smallest number of tokens that a layer attends to, as far as the config names one."""
    values = [getattr(config, field, None) for field in _WINDOW_FIELDS]
    return min((value for value in values if type(value) is int and value > 0), default=sys.maxsize)
