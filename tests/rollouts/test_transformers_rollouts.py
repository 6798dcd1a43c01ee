"""Rollouts by transformers: sampled from the model's distribution and labelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.transformers import TransformersRollouts

transformers = pytest.importorskip("transformers")


VOCAB, END = 12, 1


PROMPTS = [[3, 4, 5], [6], [7, 8]]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def logprobs_of(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


def test_every_prompt_gets_n_completions_of_its_group(model: Any) -> None:
    rollouts = TransformersRollouts(model, batch_size=2)
    completions = rollouts.generate(PROMPTS, Sampling(n=3, max_tokens=5, seed=0), groups=[9, 7, 9])
    assert [c.group for c in completions] == [9] * 3 + [7] * 3 + [9] * 3
    assert [c.prompt for c in completions] == [p for p in PROMPTS for _ in range(3)]


def test_logprobs_are_the_models_own_whatever_the_temperature(model: Any) -> None:
    for completion in TransformersRollouts(model).generate(
        PROMPTS, Sampling(temperature=0.5, max_tokens=6, seed=1)
    ):
        want = logprobs_of(model, completion.prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=1e-4)


def test_without_logprobs_the_same_tokens_come_and_no_logits_are_kept(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(n=2, max_tokens=6, seed=1)
    want = TransformersRollouts(model).generate(PROMPTS, sampling)
    generate, kept = model.generate, []

    def watched(**options: Any) -> Any:
        output = generate(**options)
        kept.append(output.logits)
        return output

    monkeypatch.setattr(model, "generate", watched)
    completions = TransformersRollouts(model, logprobs=False).generate(PROMPTS, sampling)
    assert completions == [c._replace(logprobs=[]) for c in want]
    assert kept == [None]


def test_completions_end_with_the_end_token_or_at_the_limit(model: Any) -> None:
    completions = TransformersRollouts(model).generate(PROMPTS * 8, Sampling(max_tokens=6, seed=0))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.finish_reason == "stop"
        assert (completion.tokens[-1] == END) == stopped
        assert END not in completion.tokens[:-1]
        assert stopped or len(completion.tokens) == 6


def test_a_seed_repeats_a_call_and_leaves_the_callers_random_numbers_alone(model: Any) -> None:
    rollouts, sampling = TransformersRollouts(model), Sampling(max_tokens=8, seed=5)
    torch.manual_seed(1)
    first = rollouts.generate(PROMPTS, sampling)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert rollouts.generate(PROMPTS, sampling) == first
    assert rollouts.generate(PROMPTS, Sampling(max_tokens=8, seed=6)) != first


def test_samples_follow_the_models_distribution(model: Any) -> None:
    n = 4000
    completions = TransformersRollouts(model).generate([[3]], Sampling(n=n, max_tokens=1, seed=0))
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=VOCAB) / n
    with torch.no_grad():
        want = torch.softmax(model(input_ids=torch.tensor([[3]])).logits[0, -1], -1)
    assert (counts - want).abs().max() < 4 * (0.25 / n) ** 0.5


def test_the_models_training_mode_is_restored(model: Any) -> None:
    model.train()
    TransformersRollouts(model).generate([[3]], Sampling(max_tokens=1))
    assert model.training


INVALID_OPTIONS = [
    ("n", 0),
    ("max_tokens", 0),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -1),
]


@pytest.mark.parametrize(("name", "value"), INVALID_OPTIONS)
def test_an_invalid_sampling_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "prompts", "groups"), [("prompts", [[1], []], None), ("groups", [[1], [2]], [0])]
)
def test_invalid_prompts_are_named(model: Any, name: str, prompts: Any, groups: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        TransformersRollouts(model).generate(prompts, Sampling(), groups)


def test_a_generation_config_does_not_change_what_is_sampled(model: Any) -> None:
    greedy, warm = Sampling(temperature=0, max_tokens=8), Sampling(temperature=2, max_tokens=8, n=6, seed=0)
    plain = [TransformersRollouts(model).generate(PROMPTS, sampling) for sampling in (greedy, warm)]
    options = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1, "min_p": 0.99}
    kept = {name: getattr(model.generation_config, name) for name in options}
    try:
        model.generation_config.update(**options)
        again = [TransformersRollouts(model).generate(PROMPTS, sampling) for sampling in (greedy, warm)]
    finally:
        model.generation_config.update(**kept)
    assert again == plain
