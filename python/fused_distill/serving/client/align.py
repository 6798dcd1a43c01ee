"""Placement of a teacher's answer at the hidden states that it belongs to, as the losses take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol.hidden_states import HiddenStates
from ..protocol.logprobs import TeacherLogprobs


class AlignedAnswer(NamedTuple):
    """Log-probabilities where the mask is True; absent entries (-inf, id 0) elsewhere."""

    logprobs: Tensor  # (..., K) float32
    ids: Tensor  # (..., K) int64
    actual_logprobs: Tensor  # (...) float32, 0 elsewhere
    score_logprobs: Tensor | None  # (..., M) float32


def align(answer: TeacherLogprobs, mask: Tensor) -> AlignedAnswer:
    """Put an answer's positions where `mask` is True, in order.

    The mask is the mask of the loss: True at a hidden state whose next token was scored. Left-padded prompts,
    right-padded completions and rows that pack several sequences all work, because only the order of the
    positions counts: sequence by sequence and token by token.

    Args:
        answer: P positions.
        mask: (...) bool with P True entries. The results are on its device.

    Raises:
        ValueError, TypeError: the mask does not fit the answer.
    """
    scores = answer.score_logprobs
    return AlignedAnswer(
        _scatter(torch.as_tensor(answer.logprobs), mask, -torch.inf),
        _scatter(torch.as_tensor(answer.ids).long(), mask, 0),
        _scatter(torch.as_tensor(answer.actual_logprobs), mask, 0.0),
        None if scores is None else _scatter(torch.as_tensor(scores), mask, -torch.inf),
    )


def align_hidden_states(hidden: HiddenStates, mask: Tensor) -> Tensor:
    """Put hidden states where `mask` is True and 0 elsewhere: the teacher_hidden of `fused_linear_jsd`.

    Args:
        hidden: P positions.
        mask: (...) bool with P True entries, as for `align`.

    Returns:
        (..., Dt) on the mask's device.

    Raises:
        ValueError, TypeError: the mask does not fit the hidden states.
    """
    return _scatter(hidden.states, mask, 0.0)


def _scatter(rows: Tensor, mask: Tensor, fill: float) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    index = mask.reshape(-1).nonzero().squeeze(1)
    if len(index) != len(rows):
        raise ValueError(f"mask must be True at the answer's {len(rows)} positions, got {len(index)}")
    rows = rows.to(mask.device)
    filled = rows.new_full((mask.numel(), *rows.shape[1:]), fill)
    return filled.index_copy_(0, index, rows).reshape(*mask.shape, *rows.shape[1:])
