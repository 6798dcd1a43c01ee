"""A step of sampling draws from the model's distribution, cut by temperature, top_k and top_p."""

from __future__ import annotations

import pytest
import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.sampling import random_numbers, sample

N = 2000
CPU = torch.device("cpu")


def frequencies(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return how often each token is drawn, by evenly spaced numbers, so that there is no noise."""
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    tokens = sample(logits.expand(N, -1), uniform, sampling).tokens
    return torch.bincount(tokens, minlength=len(logits)) / N


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vocab_size", [3, 512, 700])  # less than a block of columns, one, and part of one
def test_tokens_are_drawn_by_their_probabilities(vocab_size: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(vocab_size) * 3
    got = frequencies(logits, Sampling(temperature=temperature))
    assert (got - torch.softmax(logits / temperature, -1)).abs().max() < 2 / N


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.6}, {"top_p": 0.99}]
)
@pytest.mark.parametrize("spread", [3.0, 1e-3])  # with the small one, top_p needs more than the first 1024
def test_top_k_and_top_p_cut_as_transformers_does(options: dict[str, float], spread: float) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = torch.randn(1500) * spread
    scores = logits[None]
    if "top_k" in options:
        scores = transformers.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = transformers.TopPLogitsWarper(options["top_p"])(None, scores)
    got = frequencies(logits, Sampling(**options))  # pyright: ignore[reportArgumentType]
    assert (got - torch.softmax(scores[0], -1)).abs().max() < 3 / N


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 600]] = 0.0
    for u in (0.0, 0.5, 1 - 2**-53):
        drawn = sample(logits, torch.tensor([u], dtype=torch.float64), Sampling()).tokens
        assert drawn.tolist() == [3 if u < 0.5 else 600]


def test_log_probabilities_are_taken_before_temperature_and_top_p() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = sample(logits, torch.tensor([0.3], dtype=torch.float64), Sampling(temperature=0.1, top_p=0.5))
    assert drawn.tokens.tolist() == [2]
    torch.testing.assert_close(drawn.logprobs, torch.log_softmax(logits, -1)[:, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(FloatingPointError, match="are NaN or infinite"):
        sample(torch.tensor([[0.0, value]]), torch.tensor([0.5], dtype=torch.float64), Sampling())


def test_random_numbers_belong_to_the_sequence_and_differ_by_all_bits_of_the_seed() -> None:
    def numbers(seed: int, *sequences: int) -> torch.Tensor:
        return random_numbers(Sampling(seed=seed, max_tokens=4), [*sequences], CPU)

    assert torch.equal(numbers(3, 0, 5)[1], numbers(3, 5)[0])
    assert torch.equal(numbers(3, 5)[0], numbers(8, 0)[0])
    # torch's own generator on a CPU takes the lowest 32 bits of a seed only.
    assert not torch.equal(numbers(3, 0), numbers((1 << 40) + 3, 0))
