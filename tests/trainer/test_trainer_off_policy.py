"""Tests of importance weights and of the objective on sampled tokens, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Sample
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.teachers import ServedTeacher
from trainer_cases import NOT_INTERPRETED, FakeServer, Lab, metrics
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED

SAMPLES = [Sample(0, [5, 6, 7], [8, 9, 10, 11]), Sample(1, [12], [13, 14])]
LARGE = "max_grad_norm=1e9"


class Token(NamedTuple):
    """What plain PyTorch says about a sampled token."""

    student: torch.Tensor  # (98,) log-probabilities, with gradient
    teacher: torch.Tensor  # (98,) log-probabilities
    id: int
    then: float | None  # the log-probability when it was sampled


def tokens_of(trainer: Trainer, samples: list[Sample]) -> list[Token]:
    teacher: Any = trainer.teachers[""].model  # pyright: ignore[reportAttributeAccessIssue]
    tokens: list[Token] = []
    for s in samples:
        ids = torch.tensor([[*s.prompt, *s.completion]])
        rows = slice(len(s.prompt) - 1, -1)
        student, other = (
            m(input_ids=ids).logits[0, rows, :98].log_softmax(-1) for m in (trainer.model, teacher)
        )
        then = s.logprobs or [None] * len(s.completion)
        tokens += map(Token, student, other.detach(), s.completion, then)
    return tokens


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.model.parameters()]


def updated(trainer: Trainer, slices: list[list[Sample]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the metrics of an update and its gradient."""
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: seen.append(gradients(trainer)))
    return trainer.update(slices), seen[0]


def with_logprobs(trainer: Trainer, shifts: list[float]) -> list[Sample]:
    """Return SAMPLES as an older student generated them, with log-probabilities lower by the shifts."""
    now = iter([t.student[t.id].item() for t in tokens_of(trainer, SAMPLES)])
    shift = iter(shifts)
    return [s._replace(logprobs=[next(now) - next(shift) for _ in s.completion]) for s in SAMPLES]


SHIFTS = [0.0, 1.0, -1.0, 2.0, -0.5, 0.1]


@pytest.mark.parametrize("clip", [None, 2.0])
def test_sampled_objective_is_the_policy_gradient(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    options = () if clip is None else (f"rollouts.importance_clip={clip}",)
    trainer = Trainer(lab.config(tmp_path, "objective=sampled", LARGE, *options))
    samples = with_logprobs(trainer, SHIFTS)
    tokens = tokens_of(trainer, samples)
    weights = [1.0 if clip is None else min(float(np.exp(shift)), clip) for shift in SHIFTS]
    advantages = [float(t.teacher[t.id] - t.student[t.id]) for t in tokens]
    surrogate = -sum(w * a * t.student[t.id] for w, a, t in zip(weights, advantages, tokens, strict=True)) / 6
    assert isinstance(surrogate, torch.Tensor)
    surrogate.backward()
    want = gradients(trainer)
    trainer.optimizer.zero_grad()
    got_metrics, got = updated(trainer, [samples[:1], samples[1:]], monkeypatch)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(max(g.abs().max() for g in want)))
    value = -sum(w * a for w, a in zip(weights, advantages, strict=True)) / 6
    assert got_metrics["loss"] == pytest.approx(value, rel=1e-4)
    assert got_metrics["sampled_reverse_kl"] == pytest.approx(-sum(advantages) / 6, rel=1e-4)
    assert not {"forward_kl", "reverse_kl", "student_mass"} & {*got_metrics}


@pytest.mark.parametrize("targets", ["full", "topk"])
def test_importance_weights_multiply_each_tokens_loss(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    k = "" if targets == "full" else ", k: 98"
    teacher = f"teacher={{model: {lab.teacher}, targets: {targets}{k}}}"
    trainer = Trainer(lab.config(tmp_path, "beta=1", "rollouts.importance_clip=2", LARGE, teacher))
    samples = with_logprobs(trainer, SHIFTS)
    weights = [min(float(np.exp(shift)), 2.0) for shift in SHIFTS]
    kls = [(t.student.exp() * (t.student - t.teacher)).sum() for t in tokens_of(trainer, samples)]
    loss = sum(w * kl for w, kl in zip(weights, kls, strict=True)) / 6
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    want = gradients(trainer)
    trainer.optimizer.zero_grad()
    got_metrics, got = updated(trainer, [samples], monkeypatch)
    assert got_metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(max(g.abs().max() for g in want)))
    assert got_metrics["ratio_mean"] == pytest.approx(np.exp(SHIFTS).mean(), rel=1e-3)
    assert got_metrics["ratio_max"] == pytest.approx(np.exp(2.0), rel=1e-3)


def test_tokens_of_the_data_have_weight_one_and_no_ratio(lab: Lab, tmp_path: Path) -> None:
    plain = Trainer(lab.config(tmp_path))
    weighted = Trainer(lab.config(tmp_path, "rollouts.importance_clip=0.1"))
    want, got = plain.update([SAMPLES]), weighted.update([SAMPLES])
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
    assert (got["ratio_mean"], got["ratio_max"]) == (0, 0)
    assert "ratio_mean" not in want


@pytest.mark.parametrize("sampling", [(), ("rollouts.temperature=0.7", "rollouts.top_p=0.9")])
def test_the_ratio_of_unchanged_weights_is_one_whatever_the_sampling(
    lab: Lab, tmp_path: Path, sampling: tuple[str, ...]
) -> None:
    train(lab.config(tmp_path, "steps=2", "rollouts.importance_clip=1.5", *sampling))
    for row in metrics(tmp_path):
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert row["ratio_max"] == pytest.approx(1, abs=1e-3)


def test_a_served_teacher_sends_one_log_probability_per_token(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "objective=sampled"))
    logprobs = [float(t.teacher[t.id]) for t in tokens_of(trainer, SAMPLES)]
    want = trainer.update([SAMPLES])["loss"]

    class Client:
        asked: dict[str, Any]

        def get_sequence_logprobs(self, tokens: Any, lengths: Any, **options: Any) -> Any:
            self.asked = options
            return Answer(np.array(logprobs, np.float32))

    class Answer(NamedTuple):
        actual_logprobs: Any

    trainer = Trainer(lab.config(tmp_path, "objective=sampled"))
    client: Any = Client()
    settings = trainer.teachers[""].settings
    trainer.teachers[""] = ServedTeacher(client, trainer.config, settings, "sampled", 98, None, True)
    assert trainer.update([SAMPLES])["loss"] == pytest.approx(want, rel=1e-5)
    assert (client.asked["top_logprobs"], client.asked["score_ids"]) == (0, None)


@pytest.mark.parametrize("override", ["lmbda=0.5", "temperature=2"])
def test_sampled_objective_needs_the_students_own_completions_at_temperature_1(
    lab: Lab, tmp_path: Path, override: str
) -> None:
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} must be 1 with objective sampled"):
        lab.config(tmp_path, "objective=sampled", override)


AHEAD = ("rollouts.engine=vllm_server", "rollouts.url=http://x", "rollouts.ahead=1")


def test_the_next_steps_rollouts_come_from_the_weights_before_the_step(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[FakeServer] = []

    class Server(FakeServer):
        def __init__(self, *_: Any, **__: Any):
            super().__init__()
            servers.append(self)

    monkeypatch.setattr("fused_distill.trainer.rollouts.VllmRollouts", Server)
    train(lab.config(tmp_path / "run", *AHEAD))
    # Steps 0 and 1 by the first weights; then each step's weights generate the rollouts of the next.
    assert servers[0].versions == ["sync", "generate", "generate", "sync", "generate", "sync", "generate"]
    first, *later = metrics(tmp_path / "run")
    assert first["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert all(row["ratio_max"] > 1.01 for row in later)


def test_rollouts_ahead_of_other_prompts_are_generated_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of slices, which decides how many prompts of a step are on-policy, may change on resume."""
    monkeypatch.setattr("fused_distill.trainer.rollouts.VllmRollouts", FakeServer)
    mixed = (*AHEAD, "lmbda=0.5", "seed=5", "prompts_per_step=4")
    train(lab.config(tmp_path, *mixed, "steps=1", "gradient_accumulation_steps=4"))
    train(lab.config(tmp_path, *mixed, "steps=2", "gradient_accumulation_steps=2"), resume=True)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_rollouts_ahead_need_a_server(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ahead must be 0 with engine transformers"):
        lab.config(tmp_path, "rollouts.ahead=1")
