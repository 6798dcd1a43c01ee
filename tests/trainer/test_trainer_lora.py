"""Tests of LoRA: what is trained, saved, merged and sent to vLLM; and of the dtype of the saved student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.rollouts.weights import WeightsCheck, model_logprobs
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.student import load_student
from test_trainer_rollouts import NCCL, SERVER, FakeEngine, FakeNccl
from test_trainer_rollouts import vllm as vllm
from tiny_families import tiny_model
from trainer_cases import NOT_INTERPRETED, Lab, losses, save_model, transformers, weights
from trainer_cases import lab as lab

peft = pytest.importorskip("peft")
pytestmark = [NOT_INTERPRETED, pytest.mark.usefixtures("vllm")]

CPU = torch.device("cpu")
EVERY_LAYER = "lora={r: 2, target_modules: [q_proj, down_proj, lm_head], merge: true}"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same_model(trainer: Trainer, saved: Any) -> None:
    """Compare log-probabilities of 16 tokens."""
    expected, got = (model_logprobs(model, 98, CPU).logprobs for model in (trainer.model, saved.eval()))
    assert got == pytest.approx(expected, abs=1e-4)


def trained(lab: Lab, output: Path, *overrides: str) -> Trainer:
    trainer = Trainer(lab.config(output, "lmbda=0", "learning_rate=0.1", *overrides))
    for trainer.step in range(2):
        trainer.update(trainer.fill_buffer())
    return trainer


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_student_is_the_one_that_was_trained(lab: Lab, tmp_path: Path, tied: bool) -> None:
    student = save_model(tmp_path / "student", lab.student, tie_word_embeddings=tied)
    trainer = trained(lab, tmp_path, f"student={student}", EVERY_LAYER)
    trainer.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert type(saved).__name__ == "Gemma3ForCausalLM"
    assert not torch.equal(saved.lm_head.weight, load(student).lm_head.weight)  # its adapter was trained
    assert not saved.config.tie_word_embeddings  # the adapter changes the LM head alone
    assert_same_model(trainer, saved)


def test_a_merged_student_without_an_adapted_head_stays_tied(lab: Lab, tmp_path: Path) -> None:
    trainer = trained(lab, tmp_path, "lora={r: 2, merge: true}")
    trainer.save(tmp_path / "saved")
    assert weights(tmp_path / "saved").keys() == weights(lab.student).keys()
    assert_same_model(trainer, load(tmp_path / "saved"))


def test_adapters_of_experts_that_must_be_merged_are_refused_before_training(
    lab: Lab, tmp_path: Path
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "student")
    config = lab.config(tmp_path, f"student={tmp_path}/student", "lora={r: 2, merge: true}")
    with pytest.raises(
        ConfigError, match=r"^lora\.target_modules: model must have plain LoRA .* such as experts"
    ):
        load_student(config)


def test_merging_covers_embeddings_and_transposed_layers(lab: Lab, tmp_path: Path) -> None:
    """GPT-2's layers keep the transpose of their weight."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 98}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "student")
    transformers.AutoTokenizer.from_pretrained(lab.student).save_pretrained(tmp_path / "student")
    lora = "lora={r: 2, target_modules: [wte, c_attn, c_fc], merge: true}"
    trainer = trained(lab, tmp_path, f"student={tmp_path}/student", lora)
    trainer.save(tmp_path / "saved")
    assert_same_model(trainer, load(tmp_path / "saved"))


def test_adapters_alone_are_saved_without_the_layers_that_they_adapt(lab: Lab, tmp_path: Path) -> None:
    trainer = trained(lab, tmp_path, EVERY_LAYER, "lora.merge=false")
    trainer.save(tmp_path / "saved")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in saved.items())
    assert_same_model(trainer, peft.PeftModel.from_pretrained(load(lab.student), tmp_path / "saved"))


class CheckedEngine(FakeEngine):
    """Stands for VllmRollouts, with its check of log-probabilities."""

    def verify_weights(self, expected: Any) -> None:
        assert type(self.model).__name__ == "Gemma3ForCausalLM"
        self.check = getattr(self, "check", WeightsCheck())
        self.check.received(expected, model_logprobs(self.model, 98, CPU))


@pytest.mark.parametrize("engine", [SERVER, NCCL], ids=["disk", "nccl"])
def test_vllm_gets_the_weights_with_the_adapters_merged(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: tuple[str, ...]
) -> None:
    class Receiver(CheckedEngine):
        model = load(lab.student)

        def generate(self, prompts: Any, sampling: Any) -> Any:
            self.receive()
            return super().generate(prompts, sampling)

        def verify_weights(self, expected: Any) -> None:
            self.receive()
            super().verify_weights(expected)

        def receive(self) -> None:
            for name, tensor in FakeNccl.calls[-1].items() if engine is NCCL else ():
                self.model.get_parameter(name).data.copy_(tensor)

    settings = ("steps=5", "lora.r=2", "learning_rate=0.1")
    train(lab.config(tmp_path / "transformers", *settings))
    monkeypatch.setattr("fused_distill.trainer.rollouts.VllmRollouts", Receiver)
    train(lab.config(tmp_path / "vllm", *settings, *engine))
    assert losses(tmp_path / "vllm") == pytest.approx(losses(tmp_path / "transformers"), rel=1e-4)
    assert (tmp_path / "vllm/student/adapter_model.safetensors").exists()


def test_adapters_of_a_tied_head_are_refused_with_vllm(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.target_modules: must not hold lm_head with rollouts\.engine"
    ):
        Trainer(lab.config(tmp_path, *SERVER, EVERY_LAYER))
    untied = save_model(tmp_path / "untied", lab.student, tie_word_embeddings=False)
    Trainer(lab.config(tmp_path, *SERVER, EVERY_LAYER, f"student={untied}"))


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [((), "bfloat16"), (("save_dtype=float32",), "float32"), (("lora={merge: true}",), "bfloat16")],
)
def test_the_student_is_saved_in_the_dtype_of_the_input_model(
    lab: Lab, tmp_path: Path, overrides: tuple[str, ...], dtype: str
) -> None:
    load(lab.student, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    transformers.AutoTokenizer.from_pretrained(lab.student).save_pretrained(tmp_path / "bf16")
    student = train(lab.config(tmp_path, f"student={tmp_path}/bf16", "steps=1", "lmbda=0", *overrides))
    assert {tensor.dtype for tensor in weights(student).values()} == {getattr(torch, dtype)}
    assert json.loads((student / "config.json").read_text())["dtype"] == dtype
    assert load(student).dtype == getattr(torch, dtype)


def test_weights_for_vllm_keep_the_dtype_of_training(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, *SERVER, "save_dtype=bfloat16"))
    trainer.rollouts.sync_weights(0)
    assert {tensor.dtype for tensor in weights(tmp_path / "weights").values()} == {torch.float32}
