"""One step of sampling: a token per sequence from logits, by random numbers that belong to the sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Sampling

_BLOCK = 512  # columns whose probabilities are summed first
_FEW = 1024  # the most likely tokens that are looked at first for top_p


class Sampled(NamedTuple):
    """Tokens and their log-probabilities by the model itself, before temperature, top_p and top_k."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32


def random_numbers(sampling: Sampling, sequences: list[int], device: torch.device) -> Tensor:
    """Return numbers in [0, 1) for all steps of some sequences, float64 (float32 on MPS).

    Args:
        sampling: its seed must be set.
        sequences: sequence i has the random stream of seed + i, whatever the others are.
        device: of the result.
    """
    assert sampling.seed is not None
    seeds = [(sampling.seed + i) % (1 << 64) for i in sequences]
    rows = np.stack([np.random.default_rng(seed).random(sampling.max_tokens) for seed in seeds])
    return torch.from_numpy(rows).to(device, torch.float32 if device.type == "mps" else torch.float64)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Sampled:
    """Draw a token per row of logits (B, V) float32 by numbers (B,) in [0, 1).

    A token is the first whose cumulative probability exceeds the row's number.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    logits = logits[:, : sampling.vocab_size]
    normalizer = logits.logsumexp(-1)
    if not normalizer.isfinite().all():
        raise FloatingPointError("the logits of the model that generates are NaN or infinite")
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        largest = logits.amax(-1, keepdim=True)
        scores = (logits - largest).div_(sampling.temperature).exp_()  # proportional to probabilities
        if sampling.top_k or sampling.top_p < 1:
            scores, ids = _most_likely(scores, sampling)
            tokens = ids.gather(-1, _draw(scores, uniform)[:, None]).squeeze(-1)
        else:
            tokens = _draw(scores, uniform)
    return Sampled(tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer)


def _most_likely(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return scores (B, k) and ids (B, k) of the tokens that top_k and then top_p leave, others' scores 0."""
    vocab_size = scores.shape[-1]
    if sampling.top_k:
        top, ids = scores.topk(min(sampling.top_k, vocab_size))
        totals = top.sum(-1, keepdim=True)
    else:
        top, ids = scores.topk(min(_FEW, vocab_size))
        totals = scores.sum(-1, keepdim=True)
        if top.shape[-1] < vocab_size and (top.sum(-1, keepdim=True) < sampling.top_p * totals).any():
            top, ids = scores.sort(descending=True)
    above = top.cumsum(-1) - top  # of all tokens that are more likely
    return torch.where(above < sampling.top_p * totals, top, 0), ids


def _draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return a column (B,) per row of scores (B, V) >= 0, drawn in proportion to them."""
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % _BLOCK))
    blocks = padded.unflatten(-1, (-1, _BLOCK))
    block_ends = blocks.sum(-1, dtype=uniform.dtype).cumsum(-1)
    targets = uniform[:, None] * block_ends[:, -1:]
    block, rest = _find(block_ends, targets)
    columns = blocks[torch.arange(len(scores), device=scores.device), block.squeeze(-1)]
    column, _ = _find(columns.to(uniform.dtype).cumsum(-1), rest)
    return (block * _BLOCK + column).squeeze(-1)


def _find(ends: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column (B, 1) whose cumulative score exceeds the target, and what is left of this."""
    # Rounding may put a target at the sum of all; the last column with a score gets it.
    targets = torch.minimum(targets, torch.nextafter(ends[:, -1:], torch.zeros_like(targets)))
    column = torch.searchsorted(ends, targets, right=True)
    before = torch.where(column > 0, ends.gather(-1, (column - 1).clamp(min=0)), 0)
    return column, targets - before
