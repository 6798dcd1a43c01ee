"""A training loop in plain PyTorch with materialised logits, which the trainer's steps must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_distill.trainer.loop import Trainer
from trainer_cases import transformers

BETAS = pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])


def assert_equals_plain_steps(trainer: Trainer, beta: float, steps: int) -> None:
    """Train and compare losses and weights with those of the plain loop."""
    expected, weights = plain_steps(trainer, beta, steps)
    losses = []
    for trainer.step in range(steps):
        losses.append(trainer.update(trainer.fill_buffer())["loss"])
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-4)


def plain_steps(trainer: Trainer, beta: float, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of steps with full logits, one sample at a time, and the weights."""
    config = trainer.config
    student = load(config.student)
    sources = {n: config.student if t.is_self else t.model for n, t in config.all_teachers.items()}
    teachers = {name: load(source) for name, source in sources.items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    losses = []
    for trainer.step in range(steps):
        samples = [sample for part in trainer.fill_buffer() for sample in part]
        tokens, total = sum(len(s.completion) for s in samples), torch.zeros(())
        for s in samples:
            log_s = completion_logprobs(student, s.prompt, s.completion)
            prompt = s.prompt if s.teacher_prompt is None else s.teacher_prompt
            log_t = completion_logprobs(teachers[s.teacher], prompt, s.completion).detach()
            total = total + divergence(log_s, log_t, beta).sum() / tokens
        losses.append(total.item())
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(student.named_parameters())


def load(path: str | None) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def completion_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the log-probabilities (n, 98) at the n positions that predict the completion."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits
    return logits[0, len(prompt) - 1 : -1, :98].log_softmax(-1)


def divergence(log_s: torch.Tensor, log_t: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the generalized JSD of each row: beta 0 is forward KL, 1 reverse KL."""
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    kl_t, kl_s = ((log.exp() * (log - log_m)).sum(-1) for log in (log_t, log_s))
    return beta * kl_t + (1 - beta) * kl_s
