"""Distillation in transformers' Trainer by overriding one method; neither model's logits are materialised.

python examples/transformers_trainer.py    # distils one tiny random model into another, on random tokens

On several GPUs start it by torchrun --nproc-per-node N: without it the Trainer uses nn.DataParallel.
"""

from __future__ import annotations

from typing import Any

import torch
from fused_distill import fused_linear_jsd
from fused_distill.huggingface.lm_head import last_hidden_states, lm_head_of
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments


class DistillTrainer(Trainer):
    """Trainer for batches of input_ids, attention_mask and labels; labels of -100 are ignored."""

    def __init__(self, teacher: Any, beta: float, **options: Any):
        super().__init__(**options)
        self.teacher, self.beta = teacher.to(self.args.device).eval(), beta
        # Makes the Trainer count the labels of all accumulated batches, as for the models' own losses.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student, teacher = lm_head_of(self.accelerator.unwrap_model(model)), lm_head_of(self.teacher)
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = last_hidden_states(self.teacher, **tokens, use_cache=False)
            student_hidden = last_hidden_states(model, **tokens, use_cache=False)
            loss = fused_linear_jsd(
                student_hidden[:, :-1],
                student.weight,
                teacher_hidden[:, :-1],
                teacher.weight,
                mask=inputs["labels"][:, 1:] != -100,
                beta=self.beta,
                normalizer=num_items_in_batch,
                **student.options("student_"),
                **teacher.options("teacher_"),
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP divides by it
        return (loss, {"loss": loss}) if return_outputs else loss


def main() -> None:
    configs = [LlamaConfig(vocab_size=1000, hidden_size=size, num_hidden_layers=2) for size in (64, 128)]
    student, teacher = map(AutoModelForCausalLM.from_config, configs)
    rows = torch.randint(1000, (64, 24))
    data: Any = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r} for r in rows]
    args = TrainingArguments(
        "outputs/trainer", max_steps=20, learning_rate=1e-3, logging_steps=5, report_to=[]
    )
    DistillTrainer(teacher, beta=0.5, model=student, args=args, train_dataset=data).train()


if __name__ == "__main__":
    main()
