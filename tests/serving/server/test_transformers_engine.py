"""The transformers engine: limits of its model, and batches that do not fit into memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_distill.serving.protocol.request import ScoringOptions, TokenSequence
from fused_distill.serving.server.prefix_sharing import HiddenStateModel
from fused_distill.serving.server.transformers_engine import TransformersEngine, longest_sequence
from serving_cases import LENGTH
from tiny_families import tiny_model, transformers

BATCH = [TokenSequence(tuple(range(i, i + 4)), 1) for i in range(7)]
OPTIONS = ScoringOptions(2, None, 1.0)


def memory_for(monkeypatch: pytest.MonkeyPatch, sequences: int, error: RuntimeError) -> list[int]:
    """Let the model raise an error for more than so many sequences; return the sizes of its batches."""
    states, sizes = HiddenStateModel.states, list[int]()

    def limited(self: HiddenStateModel, batch: list[TokenSequence]) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > sequences:
            raise error
        return states(self, batch)

    monkeypatch.setattr(HiddenStateModel, "states", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_runs_in_halves(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    engine = TransformersEngine(model)
    whole: list[Any] = engine.score(BATCH, OPTIONS)
    sizes = memory_for(monkeypatch, 2, error)
    halves: list[Any] = engine.score(BATCH, OPTIONS)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    for one, other in zip(halves, whole, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(torch.from_numpy(one.logprobs), torch.from_numpy(other.logprobs))


def test_one_sequence_that_does_not_fit_is_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(model)
    memory_for(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        engine.score(BATCH, OPTIONS)


def test_other_errors_are_not_tried_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(model)
    sizes = memory_for(monkeypatch, 0, RuntimeError("another fault"))
    with pytest.raises(RuntimeError, match="another fault"):
        engine.score(BATCH, OPTIONS)
    assert sizes == [7]


@pytest.mark.parametrize(
    ("max_length", "message"),
    [(0, "at least 1"), (-5, "at least 1"), (LENGTH + 1, f"at most .* {LENGTH} pos")],
)
def test_a_length_that_the_model_does_not_have_is_refused(model: Any, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersEngine(model, max_length=max_length)


def test_a_config_may_say_that_the_model_has_no_longest_sequence() -> None:
    config = transformers.XLNetConfig()
    assert config.max_position_embeddings == -1
    assert longest_sequence(config, 7) == 7
    with pytest.raises(ValueError, match="max_length must be given"):
        longest_sequence(config, None)


def test_a_head_that_takes_other_states_than_the_decoders_is_refused() -> None:
    model = tiny_model("rembert")
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="which computes others"):
        TransformersEngine(model)
