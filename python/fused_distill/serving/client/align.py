"""From a teacher's answer to the tensors of the losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.hidden_states import HiddenStates
from ..protocol.logprobs import TeacherLogprobs


class AlignedAnswer(NamedTuple):
    """An answer's numbers at the hidden states that they belong to; absent (-inf, id 0) elsewhere."""

    logprobs: Tensor  # (..., K) float32
    ids: Tensor  # (..., K) int64
    actual_logprobs: Tensor  # (...) float32, 0 elsewhere
    score_logprobs: Tensor | None  # (..., M) float32


def align(answer: TeacherLogprobs, mask: Tensor) -> AlignedAnswer:
    """Put an answer's positions where `mask` is True, in order.

    The mask is that of the loss: True at a hidden state whose next token was scored. It may come from
    left-padded prompts, right-padded completions or rows that pack several sequences: only the order counts,
    sequence by sequence and token by token.

    Args:
        answer: P positions.
        mask: (...) bool with P True entries; its device is that of the tensors.

    Raises:
        ValueError, TypeError: the mask does not fit the answer.
    """
    places = _places(mask, len(answer.actual_logprobs))

    def spread(values: NDArray[Any], fill: float, dtype: torch.dtype) -> Tensor:
        return _spread(torch.as_tensor(values, dtype=dtype, device=mask.device), fill, mask, places)

    return AlignedAnswer(
        spread(answer.logprobs, -torch.inf, torch.float32),
        spread(answer.ids, 0, torch.int64),
        spread(answer.actual_logprobs, 0.0, torch.float32),
        None if answer.score_logprobs is None else spread(answer.score_logprobs, -torch.inf, torch.float32),
    )


def align_hidden_states(hidden: HiddenStates, mask: Tensor) -> Tensor:
    """The same for hidden states: the (..., Dt) teacher_hidden of `fused_linear_jsd`, 0 elsewhere."""
    places = _places(mask, len(hidden.states))
    return _spread(hidden.states.to(mask.device), 0.0, mask, places)


def _places(mask: Tensor, positions: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    places = mask.reshape(-1).nonzero().squeeze(1)
    if len(places) != positions:
        raise ValueError(f"mask must be True at the answer's {positions} positions, got {len(places)}")
    return places


def _spread(rows: Tensor, fill: float, mask: Tensor, places: Tensor) -> Tensor:
    whole = rows.new_full((mask.numel(), *rows.shape[1:]), fill)
    return whole.index_copy_(0, places, rows).reshape(*mask.shape, *rows.shape[1:])
