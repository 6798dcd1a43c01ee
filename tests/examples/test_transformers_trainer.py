"""Tests of examples/transformers_trainer.py: its loss, and gradient accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
from transformers_trainer import DistillTrainer  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="tests the example, not the kernels")

ROWS, LENGTH = 8, 12


def make_trainer(tiny_model: Path, output: Path, **options: Any) -> Any:
    """Return a trainer of two random models on rows with 1 to 8 labels."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    student = transformers.AutoModelForCausalLM.from_config(config)
    config.hidden_size = 24
    teacher = transformers.AutoModelForCausalLM.from_config(config)
    for model in (student, teacher):
        model.get_input_embeddings().weight.data.mul_(20)  # random models are nearly uniform
    data = []
    for n_labels in range(1, ROWS + 1):
        tokens = torch.randint(3, 98, (LENGTH,))
        labels = tokens.masked_fill(torch.arange(LENGTH) < LENGTH - n_labels, -100)
        data.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    args = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        max_steps=4,
        optim="sgd",
        learning_rate=0.02,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        **options,
    )
    return DistillTrainer(teacher, beta=0.0, model=student, args=args, train_dataset=data, eval_dataset=data)


def test_the_loss_equals_the_kl_of_the_models_logits(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path, per_device_eval_batch_size=ROWS)
    batch = trainer.data_collator(trainer.eval_dataset)
    mask = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        student, teacher = (
            torch.log_softmax(model(**batch).logits[:, :-1][mask], -1)
            for model in (trainer.model, trainer.teacher)
        )
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean").item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_gradient_accumulation_does_not_change_training(tiny_model: Path, tmp_path: Path) -> None:
    # The rows have different numbers of labels, so a mean of means would differ.
    once = make_trainer(tiny_model, tmp_path, per_device_train_batch_size=4)
    parts = make_trainer(tiny_model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses = []
    for trainer in (once, parts):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(list(parts.model.parameters()), list(once.model.parameters()))
