"""A step of sampling draws from the model's distribution, cut by temperature, top_k and top_p."""

from __future__ import annotations

import pytest
import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.sampling import RandomStreams, sample

N = 10_000
CPU = torch.device("cpu")


def streams(n: int = 1, seed: int = 0) -> RandomStreams:
    return RandomStreams(Sampling(seed=seed), [*range(n)], CPU)


def assert_drawn_by(probabilities: torch.Tensor, logits: torch.Tensor, sampling: Sampling) -> None:
    """Draw N tokens: how often each comes must be within five standard deviations of what is expected."""
    tokens = sample(logits.expand(N, -1), streams(N), sampling).tokens
    got = torch.bincount(tokens, minlength=len(logits)) / N
    deviation = (probabilities * (1 - probabilities) / N).sqrt()
    assert ((got - probabilities).abs() <= 5 * deviation + 2 / N).all()
    assert (got[probabilities == 0] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vocab_size", [3, 512, 700])  # less than a block of columns, one, and part of one
def test_tokens_are_drawn_by_their_probabilities(vocab_size: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(vocab_size) * 3
    want = torch.softmax(logits / temperature, -1)
    assert_drawn_by(want, logits, Sampling(temperature=temperature))


def test_blocks_of_columns_are_drawn_by_the_sums_of_their_probabilities() -> None:
    logits = torch.zeros(5 * 512)
    logits[3 * 512 + 7] = 7.0
    tokens = sample(logits.expand(N, -1), streams(N), Sampling()).tokens
    got = torch.bincount(tokens // 512, minlength=5) / N
    want = torch.softmax(logits, -1).unflatten(-1, (5, 512)).sum(-1)
    assert (got - want).abs().max() < 5 * (0.25 / N) ** 0.5


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
    want = torch.softmax(scores[0], -1)
    assert_drawn_by(want, logits, Sampling(**options))  # pyright: ignore[reportArgumentType]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1000,), -torch.inf)
    logits[[3, 600]] = 0.0
    tokens = sample(logits.expand(N, -1), streams(N), Sampling()).tokens
    assert set(tokens.tolist()) == {3, 600}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}])
def test_rounding_of_the_logits_hardly_ever_changes_a_token(options: dict[str, float]) -> None:
    """Batches, threads and teacher servers round otherwise; a completion must not depend on it."""
    torch.manual_seed(0)
    sampling = Sampling(**options)  # pyright: ignore[reportArgumentType]
    logits = (torch.randn(30_000) * 2).repeat(300, 1)
    rounded = logits + torch.randn_like(logits) * 1e-3
    tokens, others = (sample(x, streams(300), sampling).tokens for x in (logits, rounded))
    # By a cumulative sum in the order of token ids, 38 of the 300 change, and 161 with top_p.
    assert (tokens != others).sum() <= 3


def test_log_probabilities_are_taken_before_temperature_and_top_p() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = sample(logits, streams(), Sampling(temperature=0.1, top_p=0.5))
    assert drawn.tokens.tolist() == [2]
    torch.testing.assert_close(drawn.logprobs, torch.log_softmax(logits, -1)[:, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(FloatingPointError, match="are NaN or infinite"):
        sample(torch.tensor([[0.0, value]]), streams(), Sampling())


def test_random_numbers_belong_to_the_sequence_and_differ_by_all_bits_of_the_seed() -> None:
    def numbers(seed: int, *sequences: int) -> torch.Tensor:
        return RandomStreams(Sampling(seed=seed), [*sequences], CPU).exponentials(4)

    assert torch.equal(numbers(3, 0, 5)[1], numbers(3, 5)[0])
    assert torch.equal(numbers(3, 5)[0], numbers(8, 0)[0])
    # torch's own generator on a CPU takes the lowest 32 bits of a seed only.
    assert not torch.equal(numbers(3, 0), numbers((1 << 40) + 3, 0))


def test_each_step_has_new_random_numbers() -> None:
    stream = streams()
    assert not torch.equal(stream.exponentials(4), stream.exponentials(4))


@pytest.mark.parametrize(
    "options", [{"top_p": 1e-46}, {"temperature": 1e-46, "top_p": 0.9}, {"temperature": 1e-40}], ids=str
)
def test_numbers_that_float32_rounds_to_0_give_the_most_likely_token(options: dict[str, float]) -> None:
    logits = torch.tensor([[1.0, 0.0, 4.0, 2.0]])
    sampled = sample(logits, streams(), Sampling(**options))  # pyright: ignore[reportArgumentType]
    assert sampled.tokens.tolist() == [2]
