"""Rollouts by transformers: sampled from the model's distribution and labelled."""

from __future__ import annotations

import copy
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


def test_a_layer_that_was_evaluated_amid_training_stays_so(model: Any) -> None:
    model.train()
    frozen = model.model.layers[0].mlp.eval()
    TransformersRollouts(model).generate([[3]], Sampling(max_tokens=1))
    assert model.training
    assert not any(module.training for module in frozen.modules())


INVALID_OPTIONS = [
    ("n", 0),
    ("max_tokens", 0),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -1),
    ("vocab_size", 0),
]


@pytest.mark.parametrize(("name", "value"), INVALID_OPTIONS)
def test_an_invalid_sampling_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("message", "prompts", "groups"),
    [
        (r"prompts\[1\] must have at least one token", [[1], []], None),
        (r"prompts\[1\]\[0\] must be an int, got 'b'", [[1], ["b"]], None),
        ("groups must have 2 entries", [[1], [2]], [0]),
        (r"groups\[0\] must be an int, got 'a'", [[1], [2]], ["a", "b"]),
        (r"groups\[1\] must be an int, got 1\.5", [[1], [2]], [0, 1.5]),
    ],
)
def test_invalid_prompts_are_named(model: Any, message: str, prompts: Any, groups: Any) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TransformersRollouts(model).generate(prompts, Sampling(), groups)


# A value per key that would change what is sampled, how many tokens there are, or end the run in an error.
MEDDLING = {
    "max_length": 2,
    "max_new_tokens": 1,
    "min_length": 50,
    "min_new_tokens": 50,
    "early_stopping": "never",
    "max_time": 0.0,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 4,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"nonsense": 1},
    "max_cache_len": 1,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": -9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[3]],
    "renormalize_logits": True,
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 4,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": [2, 3, 4, 5],
    "begin_suppress_tokens": [2, 3, 4, 5],
    "sequence_bias": [[[3], 99.0]],
    "token_healing": True,
    "guidance_scale": 5.0,
    "watermarking_config": {"bias": 9.0},
    "num_return_sequences": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 5,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "nonsense",
    "compile_config": {"nonsense": 1},
    "disable_compile": True,
    "continuous_batching_config": {"nonsense": 1},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 9.0,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[3]],
    "prefill_chunk_size": 1,
}
NOT_OPTIONS = {"eos_token_id", "transformers_version", "_from_model_config"}


def test_no_key_of_a_generation_config_changes_what_is_sampled(model: Any) -> None:
    keys = vars(transformers.GenerationConfig()).keys() - NOT_OPTIONS
    assert keys <= MEDDLING.keys(), "a new version of transformers has further keys"
    rollouts, sampling = TransformersRollouts(model), Sampling(temperature=2, max_tokens=4, seed=0)
    plain, own = rollouts.generate(PROMPTS, sampling), model.generation_config
    try:
        for key in sorted(keys):
            model.generation_config = copy.deepcopy(own)
            setattr(model.generation_config, key, MEDDLING[key])
            given = dict(vars(model.generation_config))
            assert rollouts.generate(PROMPTS, sampling) == plain, key
            assert vars(model.generation_config) == given
    finally:
        model.generation_config = own


def test_a_missing_end_token_is_read_from_the_models_config(model: Any) -> None:
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        assert TransformersRollouts(model).ends == {END}
    finally:
        model.generation_config = own


def test_stop_tokens_end_a_completion_too(model: Any) -> None:
    sampling = Sampling(max_tokens=30, seed=0, stop_token_ids=(4, 7))
    completions = TransformersRollouts(model).generate(PROMPTS * 8, sampling)
    assert {c.tokens[-1] for c in completions} == {END, 4, 7}
    assert all(not {END, 4, 7} & {*c.tokens[:-1]} and c.finish_reason == "stop" for c in completions)


def test_a_completion_does_not_depend_on_its_batch(model: Any) -> None:
    prompts = [[3] * (1 + i % 5) for i in range(9)]
    sampling = Sampling(n=2, max_tokens=6, seed=3)
    together = TransformersRollouts(model).generate(prompts, sampling)
    for batch_size in (1, 4):
        parts = TransformersRollouts(model, batch_size).generate(prompts, sampling)
        assert [c._replace(logprobs=[]) for c in parts] == [c._replace(logprobs=[]) for c in together]
    assert TransformersRollouts(model).generate(prompts[:3], sampling) == [
        c._replace(logprobs=pytest.approx(c.logprobs, abs=1e-4)) for c in together[:6]
    ]


def test_prompts_of_similar_length_share_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, lengths = model.generate, []

    def watched(**options: Any) -> Any:
        lengths.append(sorted(options["attention_mask"].sum(-1).tolist()))
        return generate(**options)

    monkeypatch.setattr(model, "generate", watched)
    prompts = [[3] * length for length in (9, 1, 8, 2)]
    completions = TransformersRollouts(model, 2).generate(prompts, Sampling(max_tokens=1, seed=0))
    assert lengths == [[1, 2], [8, 9]]
    assert [c.prompt for c in completions] == prompts


def test_tokens_beyond_the_common_vocabulary_are_never_sampled(model: Any) -> None:
    sampling = Sampling(n=200, max_tokens=3, seed=0, vocab_size=5, temperature=3)
    completions = TransformersRollouts(model).generate([[3]], sampling)
    assert {token for c in completions for token in c.tokens} == {0, 1, 2, 3, 4}
    greedy = Sampling(temperature=0, max_tokens=3, vocab_size=2)
    assert all(t < 2 for c in TransformersRollouts(model).generate(PROMPTS, greedy) for t in c.tokens)


def test_logprobs_are_those_of_the_common_vocabulary(model: Any) -> None:
    [completion] = TransformersRollouts(model).generate([[3]], Sampling(max_tokens=1, seed=0, vocab_size=5))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3]])).logits[0, -1, :5]
    want = torch.log_softmax(logits, -1)[completion.tokens]
    torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=1e-4)


def test_weights_that_are_nan_are_one_clear_error(model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits of the model that generates are NaN or inf"):
        TransformersRollouts(broken).generate(PROMPTS, Sampling())
    assert vars(broken.generation_config) == vars(model.generation_config)
