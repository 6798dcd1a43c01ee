"""Hidden states before scored tokens, a batch at a time; a prompt that several sequences share runs once."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...huggingface.lm_head import decoder_of
from ..protocol.request import TokenSequence

_log = logging.getLogger(__name__)


class Decoder:
    """A causal language model of transformers without its head.

    Args:
        model: whose positions are as many as max_length.
        vocab_size: ids below it may be used for a trial.
        max_length: longest sequence.
        device: of the model's input.

    Raises:
        ValueError: a model whose hidden states cannot be had, or depend on what it ran before.
    """

    def __init__(self, model: Any, vocab_size: int, max_length: int, device: torch.device):
        self.decoder = decoder_of(model)
        self.max_length, self.device = max_length, device
        kinds = _rope_kinds(model.config.get_text_config())
        if "dynamic" in kinds:
            raise ValueError(
                "model must have positions that do not depend on what it ran before, got dynamic rope scaling"
            )
        # The longest sequence of a batch decides on its factors.
        self.one_by_one = "longrope" in kinds
        ids = [i % vocab_size for i in range(6)]
        trial = [TokenSequence((*ids[:3], *ids[i:]), 3) for i in range(2)] + [
            TokenSequence((*ids[:2], *ids), 2)
        ]
        try:
            apart = self.apart(trial)
        except AttributeError as error:
            raise ValueError(f"model must give last hidden states, got {type(model).__name__}") from error
        self.shares_prompts = not self.one_by_one and self._sharing_works(trial, apart)

    def states(self, batch: list[TokenSequence]) -> Tensor:
        """(P, D) last hidden states before each scored token, sequence by sequence."""
        if self.one_by_one:
            return torch.cat([self.apart([sequence]) for sequence in batch])
        if self.shares_prompts and self.sharing_saves(batch):
            try:
                return self.shared(batch)
            except torch.OutOfMemoryError:
                _log.warning("no memory for the cache of shared prompts: the batch runs without")
        return self.apart(batch)

    @torch.inference_mode()
    def apart(self, batch: list[TokenSequence]) -> Tensor:
        """The states by one pass over all sequences, right-padded."""
        tokens = pad_sequence([torch.tensor(s.tokens) for s in batch], batch_first=True).to(self.device)
        lengths = torch.tensor([len(s.tokens) for s in batch], device=self.device).unsqueeze(1)
        starts = torch.tensor([s.start for s in batch], device=self.device).unsqueeze(1)
        index = torch.arange(tokens.shape[1], device=self.device)
        output = self.decoder(input_ids=tokens, attention_mask=(index < lengths).long(), use_cache=False)
        return output.last_hidden_state[(index >= starts - 1) & (index < lengths - 1)]

    def sharing_saves(self, batch: list[TokenSequence]) -> bool:
        """Whether `shared` runs fewer tokens than `apart`, padding included, within the model's positions."""
        prefixes = {s.tokens[: s.start] for s in batch}
        longest, longest_rest = max(map(len, prefixes)), max(len(s.tokens) - s.start for s in batch)
        tokens = len(prefixes) * longest + len(batch) * longest_rest
        fewer = tokens < len(batch) * max(len(s.tokens) for s in batch)
        return fewer and longest + longest_rest <= self.max_length

    @torch.inference_mode()
    def shared(self, batch: list[TokenSequence]) -> Tensor:
        """The states by two passes: every different prompt once, left-padded, then what follows on its cache.

        The cache holds every sequence's prompt again, so that memory is not what is saved.
        """
        prefixes = list(dict.fromkeys(s.tokens[: s.start] for s in batch))
        longest = max(map(len, prefixes))
        padding = torch.tensor([longest - len(p) for p in prefixes], device=self.device).unsqueeze(1)
        index = torch.arange(longest, device=self.device)
        seen = (index >= padding).long()
        rows = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prefixes], device=self.device)
        positions = (index - padding).clamp_min(0)
        first = self.decoder(input_ids=rows, attention_mask=seen, position_ids=positions, use_cache=True)

        place = {prefix: i for i, prefix in enumerate(prefixes)}
        owner = torch.tensor([place[s.tokens[: s.start]] for s in batch], device=self.device)
        states = first.last_hidden_state[owner, -1:]  # (B, 1, D)
        # A sequence's last token predicts nothing that is asked for.
        rests = [torch.tensor(s.tokens[s.start : -1], dtype=torch.int64) for s in batch]
        counts = torch.tensor([s.positions for s in batch], device=self.device).unsqueeze(1)
        longest_rest = max(map(len, rests))
        if longest_rest:
            cache = first.past_key_values
            cache.batch_select_indices(owner)
            index = torch.arange(longest_rest, device=self.device)
            real = index < counts - 1
            then = self.decoder(
                input_ids=pad_sequence(rests, batch_first=True).to(self.device),
                attention_mask=torch.cat([seen[owner], real.long()], 1),
                position_ids=torch.where(real, index + longest - padding[owner], 0),
                past_key_values=cache,
                use_cache=True,
            )
            states = torch.cat([states, then.last_hidden_state], 1)
        return states[torch.arange(states.shape[1], device=self.device) < counts]

    def _sharing_works(self, trial: list[TokenSequence], apart: Tensor) -> bool:
        """Two passes over a cache give what one pass gives; a family may keep none, or another kind."""
        try:
            works = agree(self.shared(trial), apart)
        except Exception as error:  # each family without such a cache fails in its own way
            _log.warning("shared prompts run for each sequence: %s: %s", type(error).__name__, error)
            return False
        if not works:
            _log.warning("shared prompts run for each sequence: this model's cache gives other states")
        return works


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, over the whole: single numbers of a low precision may be far apart."""
    if a.shape != b.shape:
        return False
    tolerance = max(1e-3, 8 * torch.finfo(a.dtype).eps)
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def _rope_kinds(config: Any) -> set[str]:
    """Of its rotary positions, which some families give per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {found.get("rope_type", "") for found in (rope, *rope.values()) if isinstance(found, dict)}
