"""The trainer computes what students and teachers of all kinds of families compute, or refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.huggingface.lm_head import LMHeadParams
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Batch, Sample
from fused_distill.trainer.student import load_student, run_in_student_forward
from fused_distill.trainer.targets import FullTargets
from fused_distill.trainer.teachers import load_teachers
from tiny_families import tiny_model as family_model
from torch import Tensor
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = [NOT_INTERPRETED, pytest.mark.filterwarnings("ignore")]  # about configs

CPU = torch.device("cpu")
# A softcap under another name, one that is ignored, an encoder-decoder's decoder, a transform before the
# head, no softcap at all, and fewer logits than rows.
FAMILIES = ["recurrent_gemma", "gemma3", "bart", "roberta", "mpt", "inkling2_text"]


def save(family: str, tiny_model: Path, folder: Path) -> Path:
    family_model(family).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def batch_and_logits(model: Any) -> tuple[Batch, Tensor]:
    """Return a padded batch and the model's own logits at its valid tokens."""
    samples = [Sample(0, [5, 6, 7], [8, 9, 10], False), Sample(1, [11], [12, 13], False)]
    batch = Batch.collate(samples, CPU)
    return batch, batch.pack(model(input_ids=batch.tokens, attention_mask=batch.attention).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_students_logits_and_gradients_are_the_models(
    lab: Lab, tiny_model: Path, tmp_path: Path, family: str
) -> None:
    student = save(family, tiny_model, tmp_path / "student")
    model = load_student(lab.config(tmp_path, f"student={student}"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch, expected = batch_and_logits(model)

    def compute(hidden: Tensor, head: LMHeadParams) -> tuple[Tensor, Tensor]:
        logits = head.logits(hidden)
        return logits.square().sum(), logits

    loss, logits = run_in_student_forward(model, model, batch, compute)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    ours, peer = (
        torch.autograd.grad(sum_, [*trained.values()], allow_unused=True, materialize_grads=True)
        for sum_ in (loss, expected.square().sum())
    )
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-3 * float(max(g.abs().max() for g in peer)))


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_logits_are_the_models(lab: Lab, tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = save(family, tiny_model, tmp_path / "teacher")
    config = lab.config(tmp_path, f"teacher.model={folder}", "teacher.targets=full")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    teacher: Any = load_teachers(config, tokenizer, CPU)[""]
    batch, expected = batch_and_logits(teacher.model)
    targets = teacher.targets(batch, None)
    assert isinstance(targets, FullTargets)
    torch.testing.assert_close(targets.head.logits(targets.hidden), expected, rtol=1e-4, atol=1e-4)


def test_transform_before_the_head_is_trained(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
    student = save("roberta", tiny_model, tmp_path / "student")
    model: Any = load_student(lab.config(tmp_path, f"student={student}"))
    assert model.lm_head.dense.weight.requires_grad


def test_student_whose_logits_cannot_be_computed_is_refused(
    lab: Lab, tiny_model: Path, tmp_path: Path
) -> None:
    student = save("prophetnet", tiny_model, tmp_path / "student")
    with pytest.raises(ConfigError, match="student: the logits of ProphetNetForCausalLM cannot be computed"):
        load_student(lab.config(tmp_path, f"student={student}"))


def test_teacher_whose_logits_cannot_be_computed_is_refused(
    lab: Lab, tiny_model: Path, tmp_path: Path
) -> None:
    folder = save("prophetnet", tiny_model, tmp_path / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match=r"teacher\.model: the logits of ProphetNetForCausalLM"):
        load_teachers(lab.config(tmp_path, f"teacher.model={folder}"), tokenizer, CPU)
