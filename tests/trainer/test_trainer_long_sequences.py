"""Tests of what long sequences need: recomputed activations, attention, micro-batches and positions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Batch, Sample
from fused_distill.trainer.long_sequences import max_positions, split_by_tokens
from fused_distill.trainer.loop import Trainer
from plain_loop import BETAS, assert_equals_plain_steps
from trainer_cases import NOT_INTERPRETED, Lab, save_model, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


@BETAS
@pytest.mark.parametrize(
    "options",
    [(), ("tokens_per_forward=24",), ("gradient_checkpointing=true",)],
    ids=["", "tokens", "layers"],
)
def test_ten_steps_equal_a_plain_pytorch_loop(
    lab: Lab, tmp_path: Path, beta: float, options: tuple[str, ...]
) -> None:
    settings = (f"beta={beta}", "lmbda=0", "steps=10", "learning_rate=0.001", *options)
    assert_equals_plain_steps(Trainer(lab.config(tmp_path, *settings)), beta, 10)


def gradients(trainer: Trainer, buffer: list[list[Sample]]) -> tuple[list[torch.Tensor], int]:
    """Return the gradients of a step's loss, and how often layers of the student ran."""
    runs = []
    layers = [m for m in trainer.model.modules() if type(m).__name__ == "Gemma3MLP"]
    hooks = [layer.register_forward_hook(lambda *_: runs.append(1)) for layer in layers]
    [batch] = trainer.collate(buffer)
    trainer.accelerator.backward(trainer.loss(batch, 1.0)[0])
    for hook in hooks:
        hook.remove()
    return [p.grad for p in trainer.model.parameters() if p.grad is not None], len(runs)


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["full", "lora"])
def test_checkpointed_layers_run_twice_and_give_the_same_gradients(
    lab: Lab, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    buffer = Trainer(lab.config(tmp_path, "lmbda=0")).fill_buffer()
    expected, once = gradients(Trainer(lab.config(tmp_path, *lora)), buffer)
    got, twice = gradients(Trainer(lab.config(tmp_path, *lora, "gradient_checkpointing=true")), buffer)
    assert (once, twice) == (2, 4)
    assert len(expected) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_dropout_stays_disabled_when_activations_are_recomputed(lab: Lab, tmp_path: Path) -> None:
    """OPT's layers apply dropout themselves, in training mode."""
    config = transformers.OPTConfig(
        vocab_size=98, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.5
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    transformers.AutoTokenizer.from_pretrained(lab.student).save_pretrained(tmp_path / "opt")
    losses = []
    for option in ("gradient_checkpointing=true", "gradient_checkpointing=false"):
        trainer = Trainer(lab.config(tmp_path, f"student={tmp_path}/opt", "lmbda=0", option))
        losses.append(trainer.update(trainer.fill_buffer()))
    assert losses[0] == losses[1]


def test_rollouts_of_a_model_with_checkpointed_layers_use_its_cache(lab: Lab, tmp_path: Path) -> None:
    buffers = [
        Trainer(lab.config(tmp_path, f"gradient_checkpointing={on}")).fill_buffer()
        for on in ("true", "false")
    ]
    assert buffers[0] == buffers[1]


def test_a_model_without_layers_to_recompute_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_distill.trainer.long_sequences.checkpointed_layers", lambda _: [])
    with pytest.raises(ConfigError, match="gradient_checkpointing: Gemma3ForCausalLM has no layers"):
        Trainer(lab.config(tmp_path, "gradient_checkpointing=true"))


def test_attention_is_that_of_the_settings_in_both_models(lab: Lab, tmp_path: Path) -> None:
    losses = []
    for attention in ("sdpa", "eager"):
        trainer = Trainer(lab.config(tmp_path, f"attention={attention}", "lmbda=0"))
        teacher: Any = trainer.teachers[""]
        for model in (trainer.model, teacher.model):
            assert model.config._attn_implementation == attention
        losses.append(trainer.update(trainer.fill_buffer())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_flash_attention_that_is_not_installed_is_reported_before_any_work(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(tmp_path, "attention=flash_attention_2", "student=/nowhere")
    with pytest.raises(ConfigError, match="attention: flash_attention_2 needs flash_attn beside the trainer"):
        Trainer(config)


def test_flash_attention_in_float32_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_distill.trainer.start.find_spec", lambda _: True)
    with pytest.raises(ConfigError, match="flash_attention_2 needs precision bf16 or fp16, got fp32"):
        Trainer(lab.config(tmp_path, "attention=flash_attention_2"))


def test_attention_that_a_model_does_not_support_is_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.Gemma3TextModel, "_supports_sdpa", False)
    monkeypatch.setattr(transformers.Gemma3ForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ConfigError, match=r"attention: Gemma3.* does not support"):
        Trainer(lab.config(tmp_path, "attention=sdpa"))


def drawn_samples(seed: int) -> list[Sample]:
    draw = random.Random(seed)
    return [
        Sample(i, [1] * draw.randint(1, 9), [2] * draw.randint(0, 40)) for i in range(draw.randint(1, 30))
    ]


@pytest.mark.parametrize("limit", [1, 30, 64, 1000])
def test_micro_batches_hold_every_sample_once_within_the_limit(limit: int) -> None:
    accelerator = Accelerator(cpu=True)
    for seed in range(20):
        slices = [drawn_samples(seed), drawn_samples(seed + 100)]
        parts = split_by_tokens(slices, limit, accelerator)
        assert sorted(s for part in parts for s in part) == sorted(s for part in slices for s in part)
        for part in parts:
            assert len(part) == 1 or len(part) * max(len(s.tokens) for s in part) <= limit


def test_micro_batches_hold_samples_of_similar_lengths() -> None:
    samples = [Sample(i, [1], [2] * n) for i, n in enumerate([1, 19, 2, 18, 3, 17])]
    parts = split_by_tokens([samples], 60, Accelerator(cpu=True))
    assert [[len(s.completion) for s in part] for part in parts] == [[19, 18, 17], [3, 2, 1]]


def test_a_process_with_fewer_micro_batches_splits_further(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "gather", lambda number: torch.cat([number, torch.tensor([4])]))
    samples = [Sample(i, [1], [2] * n) for i, n in enumerate([1, 19, 2, 18, 3, 17])]
    parts = split_by_tokens([samples], 60, accelerator)
    assert [[len(s.completion) for s in part] for part in parts] == [[19], [18], [17], [3, 2, 1]]


def test_evaluation_keeps_to_tokens_per_forward(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Trainer(lab.config(tmp_path, "data.evaluation_prompts=8")).evaluate()
    trainer = Trainer(lab.config(tmp_path, "data.evaluation_prompts=8", "tokens_per_forward=24"))
    sizes: list[int] = []
    loss = trainer.loss

    def watched(batch: Batch, *others: Any) -> Any:
        sizes.append(batch.tokens.numel())
        return loss(batch, *others)

    monkeypatch.setattr(trainer, "loss", watched)
    got = trainer.evaluate()
    assert len(sizes) > 1
    assert max(sizes) <= 24
    for metrics in (got[0], expected[0]):
        del metrics["evaluation_seconds"]
    assert got[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("key", ["student", "teacher.model"])
def test_sequences_beyond_a_models_positions_are_refused(lab: Lab, tmp_path: Path, key: str) -> None:
    """The longest prompt has 12 tokens."""
    changes = {} if key == "student" else {"hidden_size": 24}
    short = save_model(tmp_path / "short", lab.student, max_position_embeddings=18, **changes)
    Trainer(lab.config(tmp_path, f"{key}={short}"))
    with pytest.raises(ConfigError) as error:
        Trainer(lab.config(tmp_path, f"{key}={short}", "rollouts.max_completion_length=7"))
    assert str(error.value) == (
        f"{key}: the model has positions for 18 tokens, the longest prompt with "
        "rollouts.max_completion_length (7) needs 19; lower that or data.max_prompt_length (512)"
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.GPT2Config(n_positions=77), 77),
        (transformers.MistralConfig(max_position_embeddings=88), 88),
        (transformers.MambaConfig(), None),
        (
            transformers.Qwen3Config(
                max_position_embeddings=100,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 80,
                },
            ),
            320,
        ),
    ],
    ids=["learned", "rotary", "none", "extended"],
)
def test_positions_are_those_of_the_config_or_of_its_extension(config: Any, limit: int | None) -> None:
    assert max_positions(config) == limit
