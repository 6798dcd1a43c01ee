"""Hidden states of batches whose sequences share prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fused_distill.serving.protocol.request import TokenSequence
from fused_distill.serving.server.prefix_sharing import HiddenStateModel
from fused_distill.serving.server.transformers_engine import TransformersEngine
from serving_cases import (
    LENGTH,
    VOCAB,
    post,
    serving,
)
from tiny_families import tiny_model

transformers = pytest.importorskip("transformers")


# Families whose attention differs: full, windows shorter than the prompts, both in turns, learned positions.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": LENGTH},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 2,
        "window_size": 5,
    },
}


def model_of(family: str, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    settings = {"max_position_embeddings": LENGTH, **({} if family == "gpt2" else sizes)}
    if family == "gpt_neo":
        del settings["num_hidden_layers"], settings["num_attention_heads"]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, **{**settings, **FAMILIES.get(family, {}), **options}
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def hidden_state_model(model: Any) -> HiddenStateModel:
    return HiddenStateModel(model, VOCAB, LENGTH, torch.device("cpu"))


def one_by_one(decoder: HiddenStateModel, batch: list[TokenSequence]) -> torch.Tensor:
    return torch.cat([decoder.forward_padded([sequence]) for sequence in batch])


def three_generations_each(*lengths: int) -> list[TokenSequence]:
    """Of five tokens, for a prompt of each length."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCAB, length).tolist() for length in lengths]
    rests = generator.integers(0, VOCAB, (3, 5)).tolist()
    return [TokenSequence((*prompt, *rest), len(prompt)) for rest in rests for prompt in prompts]


def generations(seed: int) -> list[TokenSequence]:
    """Of three prompts of different lengths, up to four each; one only repeats its prompt."""
    generator = np.random.default_rng(seed)
    batch = []
    for length in (9, 17, 1):
        prompt = generator.integers(0, VOCAB, length).tolist()
        for count in range(generator.integers(1, 5)):
            rest = generator.integers(0, VOCAB, count * 3).tolist()
            batch.append(TokenSequence((*prompt, *rest), length))
    return [batch[i] for i in generator.permutation(len(batch))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_prompt_gives_the_states_of_separate_ones(family: str, seed: int) -> None:
    decoder, batch = hidden_state_model(model_of(family)), generations(seed)
    assert decoder.shares_prompts
    shared, separate = decoder.forward_shared_prefix(batch), one_by_one(decoder, batch)
    torch.testing.assert_close(shared, separate, atol=1e-5, rtol=1e-5)


def test_generations_of_one_prompt_run_it_once(model: Any) -> None:
    engine, tokens = TransformersEngine(model), 0

    def count(_: Any, __: Any, options: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += options["input_ids"].numel()

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    with serving(engine) as served:
        sequences = [[*range(40), *range(i, i + 5)] for i in range(8)]
        post(served.url, sequences=sequences, prompt_lengths=[40] * 8)
    hook.remove()
    assert tokens == 40 + 8 * 4


def test_prompts_are_not_shared_where_that_runs_more_tokens() -> None:
    long, short = tuple(range(30)), tuple(range(5))
    decoder = hidden_state_model(model_of("llama"))
    assert not decoder.sharing_saves([TokenSequence((*long, 1), 30), TokenSequence((*short, *long), 5)])


def test_a_model_that_scales_attention_by_padded_positions_does_not_share() -> None:
    # Llama 4 does so by the length of its cache.
    sizes = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size_mlp": 32}
    scaling = {"no_rope_layers": [0] * 3, "floor_scale": 4, "attn_scale": 0.5}
    model, batch = model_of("llama4_text", **sizes, **scaling), three_generations_each(20, 9)
    decoder = hidden_state_model(model)
    assert not decoder.shares_prompts
    torch.testing.assert_close(decoder.states(batch), one_by_one(decoder, batch), atol=1e-5, rtol=1e-5)


def test_a_cache_that_is_wrong_beyond_a_window_is_not_used() -> None:
    # Moshi's cache gives the states of one pass until a prompt is longer than the window.
    model, batch = model_of("moshi", sliding_window=10, head_dim=8, ffn_dim=32), three_generations_each(20)
    decoder = hidden_state_model(model)
    torch.testing.assert_close(decoder.states(batch), one_by_one(decoder, batch), atol=1e-5, rtol=1e-5)


def test_sequences_longer_than_a_window_that_was_not_tried_do_not_share() -> None:
    decoder = hidden_state_model(model_of("mistral", sliding_window=LENGTH - 3))
    assert decoder.shares_prompts
    for length, saves in ((LENGTH - 3, True), (LENGTH - 2, False)):
        assert decoder.sharing_saves([TokenSequence((*[1] * (length - 1), i), 50) for i in range(2)]) == saves


def test_a_model_whose_states_change_with_padding_runs_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    def count_from_the_end(_: Any, __: Any, options: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        positions = torch.arange(options["input_ids"].shape[1]).flip(0).unsqueeze(0)
        return (), {**options, "position_ids": positions}

    model, batch = model_of("gpt2"), three_generations_each(20, 9)
    model.get_decoder().register_forward_pre_hook(count_from_the_end, with_kwargs=True)
    decoder = hidden_state_model(model)
    assert "one by one" in caplog.text
    assert torch.equal(decoder.states(batch), one_by_one(decoder, batch))


def test_sparse_attention_runs_one_by_one_beyond_what_it_chooses() -> None:
    # The indexer of DeepSeek V3.2 may choose padding.
    decoder = hidden_state_model(tiny_model("deepseek_v32"))
    assert decoder.one_by_one


@pytest.mark.parametrize("family", ["bert-generation", "cpmant", "xlnet"])
def test_a_model_that_looks_at_later_tokens_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="must be causal"):
        TransformersEngine(tiny_model(family), max_length=LENGTH)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_sharing_never_reaches_beyond_the_models_positions(family: str) -> None:
    # Prompt and rest are within the limit of every sequence, the longest of each together are not.
    batch = [TokenSequence((*range(40), *range(10, 15 + i)), 40) for i in range(5)]
    batch.append(TokenSequence((*range(10), *range(30)), 10))
    decoder = hidden_state_model(model_of(family))
    separate = torch.cat([decoder.forward_padded([sequence]) for sequence in batch])
    torch.testing.assert_close(decoder.states(batch), separate, atol=1e-5, rtol=1e-5)


def test_positions_that_depend_on_the_longest_sequence_run_one_by_one() -> None:
    # Phi 3's long rope takes other factors beyond the length it was trained at.
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = model_of("phi3", rope_parameters=rope, original_max_position_embeddings=32, pad_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # attention that is not nearly uniform
    batch = [TokenSequence(tuple(range(n)), 4) for n in (25, 45)]
    decoder = hidden_state_model(model)
    separate = torch.cat([decoder.forward_padded([sequence]) for sequence in batch])
    assert torch.equal(decoder.states(batch), separate)
    assert not torch.allclose(decoder.forward_padded(batch), separate, atol=1e-3)


def test_positions_that_depend_on_what_ran_before_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic rope"):
        TransformersEngine(model_of("llama", rope_parameters=rope))


def test_low_precision_rounding_does_not_disable_sharing() -> None:
    engine = TransformersEngine(model_of("llama").bfloat16())
    assert engine.hidden_state_model.shares_prompts


def test_a_model_without_such_a_cache_is_served_without_sharing() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    mamba = transformers.AutoModelForCausalLM.from_config(config)
    engine = TransformersEngine(mamba, max_length=64)
    assert not engine.hidden_state_model.shares_prompts
