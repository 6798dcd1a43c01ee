"""Tests of loading the student: dtypes, and which parameters are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.student import load_student
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
