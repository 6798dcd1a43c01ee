"""Hidden states before scored tokens, a batch at a time; a prompt that several sequences share runs once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .sequences import Sequence


def scored_states(decoder: Any, batch: list[Sequence], device: torch.device) -> Tensor:
    """(P, D) last hidden states before each scored token, sequence by sequence, by one forward pass."""
    tokens = pad_sequence([torch.tensor(s.tokens) for s in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(s.tokens) for s in batch], device=device).unsqueeze(1)
    starts = torch.tensor([s.start for s in batch], device=device).unsqueeze(1)
    index = torch.arange(tokens.shape[1], device=device)
    output = decoder(input_ids=tokens, attention_mask=(index < lengths).long(), use_cache=False)
    return output.last_hidden_state[(index >= starts - 1) & (index < lengths - 1)]


def sharing_saves(batch: list[Sequence]) -> bool:
    """Whether `scored_states_shared` runs fewer tokens, padding included, than `scored_states`."""
    prefixes = {s.tokens[: s.start] for s in batch}
    longest_rest = max(len(s.tokens) - s.start for s in batch)
    apart = len(batch) * max(len(s.tokens) for s in batch)
    return len(prefixes) * max(map(len, prefixes)) + len(batch) * longest_rest < apart


def scored_states_shared(decoder: Any, batch: list[Sequence], device: torch.device) -> Tensor:
    """The same by two passes: every different prompt once, left-padded, then what follows on its cache."""
    prefixes = list(dict.fromkeys(s.tokens[: s.start] for s in batch))
    longest = max(map(len, prefixes))
    padding = torch.tensor([longest - len(p) for p in prefixes], device=device).unsqueeze(1)
    index = torch.arange(longest, device=device)
    seen = (index >= padding).long()
    rows = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prefixes], device=device)
    first = decoder(
        input_ids=rows, attention_mask=seen, position_ids=(index - padding).clamp_min(0), use_cache=True
    )

    owner = torch.tensor([prefixes.index(s.tokens[: s.start]) for s in batch], device=device)
    last_states = first.last_hidden_state[owner, -1:]  # (B, 1, D)
    # A sequence's last token predicts nothing that is asked for.
    rests = [torch.tensor(s.tokens[s.start : -1], dtype=torch.int64) for s in batch]
    counts = torch.tensor([s.positions for s in batch], device=device).unsqueeze(1)
    longest_rest = max(map(len, rests))
    states = last_states
    if longest_rest:
        cache = first.past_key_values
        cache.batch_select_indices(owner)
        index = torch.arange(longest_rest, device=device)
        then = decoder(
            input_ids=pad_sequence(rests, batch_first=True).to(device),
            attention_mask=torch.cat([seen[owner], (index < counts - 1).long()], 1),
            position_ids=index + longest - padding[owner],
            past_key_values=cache,
            use_cache=True,
        )
        states = torch.cat([last_states, then.last_hidden_state], 1)
    return states[torch.arange(states.shape[1], device=device) < counts]
