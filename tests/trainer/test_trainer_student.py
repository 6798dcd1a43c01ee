"""Tests of loading the student: dtypes, and which parameters are trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.student import load_pretrained, load_student, make_optimizer
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def test_lora_with_bf16_has_float32_adapters_on_a_bfloat16_base(lab: Lab, tmp_path: Path) -> None:
    model = load_student(lab.config(tmp_path, "lora.r=2", "precision=bf16"))
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_parameters_that_the_loss_does_not_reach_are_not_trained(
    lab: Lab, tiny_model: Path, tmp_path: Path
) -> None:
    """DDP would wait for a vision tower's gradients."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=transformers.AutoConfig.from_pretrained(tiny_model).to_dict(),
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "student")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "student")
    model = load_student(lab.config(tmp_path, f"student={tmp_path}/student"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("vision" in name or "projector" in name for name in trained)
    assert len(trained) < len([*model.parameters()])


@pytest.mark.parametrize(
    ("frozen", "message"),
    [("[embd]", "frozen: no parameter has 'embd' in its name"), ("['.']", "leaves nothing to train")],
)
def test_frozen_must_match_parameters_and_leave_some_to_train(
    lab: Lab, tmp_path: Path, frozen: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_student(lab.config(tmp_path, f"frozen={frozen}"))


def test_a_student_without_a_tokenizer_is_told_how_to_get_one(lab: Lab, tmp_path: Path) -> None:
    # transformers would make a tokenizer of five tokens for this model.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lab.student / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError) as error:
        load_pretrained(transformers.AutoTokenizer, "student", str(tmp_path))
    saved = f"AutoTokenizer.from_pretrained(NAME).save_pretrained('{tmp_path}')"
    assert str(error.value).endswith(f": {tmp_path} has no tokenizer: save that of its model there, {saved}")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_said_to_be_no_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ConfigError) as error:
        load_pretrained(transformers.AutoTokenizer, "student", "nosuchfolder")
    reason = "there is no folder nosuchfolder, and loading it from the hub failed: no connection"
    assert str(error.value) == f"student: nosuchfolder cannot be loaded: {reason}"


@pytest.mark.parametrize(
    ("device", "precision", "fused"),
    [("cuda", "bf16", True), ("cuda", "fp32", True), ("cuda", "fp16", False), ("cpu", "fp32", False)],
)
def test_the_optimizer_makes_no_copies_of_the_weights_on_a_gpu(
    lab: Lab, tmp_path: Path, device: str, precision: str, fused: bool
) -> None:
    config = lab.config(tmp_path, f"precision={precision}", "weight_decay=0.5")
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(2))], config, torch.device(device))
    assert optimizer.defaults["fused"] is fused
    assert optimizer.defaults["weight_decay"] == 0.5
