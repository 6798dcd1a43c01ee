"""One step of sampling: a token per sequence from logits, by random numbers that belong to the sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Sampling

_BLOCK = 512  # columns of which one is drawn after their block
_COLDEST = torch.finfo(torch.float32).tiny  # its reciprocal is finite
_FEW = 1024  # the most likely tokens that are looked at first for top_p


class Sampled(NamedTuple):
    """Tokens and their log-probabilities by the model itself, before temperature, top_p and top_k."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32


class RandomStreams:
    """Random numbers of some sequences, which do not depend on the other sequences of a batch.

    Args:
        sampling: its seed must be set.
        sequences: sequence i has the random numbers of seed + i.
        device: of the numbers.
    """

    def __init__(self, sampling: Sampling, sequences: list[int], device: torch.device):
        assert sampling.seed is not None
        self.generators = [np.random.default_rng((sampling.seed + i) % (1 << 64)) for i in sequences]
        self.device = device

    def exponentials(self, n: int) -> Tensor:
        """Return the next n of each sequence, exponentially distributed with mean 1.

        They are positive and (B, n) float64, or float32 on MPS.
        """
        numbers = np.stack([generator.standard_exponential(n) for generator in self.generators])
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.from_numpy(numbers).to(self.device, dtype).clamp_(min=torch.finfo(dtype).tiny)


def sample(logits: Tensor, streams: RandomStreams, sampling: Sampling) -> Sampled:
    """Draw a token per row of logits (B, V) float32, by the next random numbers of the row's stream.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    logits = logits[:, : sampling.vocab_size]
    normalizer = logits.logsumexp(-1)
    if not normalizer.isfinite().all():
        raise FloatingPointError("the logits of the model that generates are NaN or infinite")
    if sampling.temperature < _COLDEST:
        tokens = logits.argmax(-1)
    else:
        largest = logits.amax(-1, keepdim=True)
        scores = (logits - largest).div_(sampling.temperature).exp_()  # proportional to probabilities
        if sampling.top_k or sampling.top_p < 1:
            scores = _most_likely(scores, sampling)
        tokens = _draw(scores, streams)
    return Sampled(tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer)


def _most_likely(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return scores (B, V) of the tokens that top_k and then top_p keep, and 0 for others."""
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
    kept = torch.where(above < sampling.top_p * totals, top, 0)
    kept[:, 0] = top[:, 0]  # also if top_p is 0 in float32
    return torch.zeros_like(scores).scatter_(-1, ids, kept)


def _draw(scores: Tensor, streams: RandomStreams) -> Tensor:
    """Return a column (B,) per row of scores (B, V) >= 0, drawn in proportion to them.

    The largest quotient of a score and an exponentially distributed number belongs to each column with the
    probability score / sum. Such a draw picks a block of columns by their sums, and another a column of it,
    so that V / 512 + 512 random numbers suffice. Unlike by a cumulative sum, where rounding moves the borders
    of all later columns, scores that are rounded otherwise give another column very rarely.
    """
    blocks = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    numbers = streams.exponentials(blocks.shape[1] + _BLOCK)
    for_blocks, for_columns = numbers.split([blocks.shape[1], _BLOCK], -1)
    block = (blocks.sum(-1, dtype=numbers.dtype) / for_blocks).argmax(-1)
    columns = blocks[torch.arange(len(scores), device=scores.device), block]
    return block * _BLOCK + (columns / for_columns).argmax(-1)
