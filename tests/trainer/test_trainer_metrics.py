"""Tests of what a run logs: metrics.jsonl, samples, trackers and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.trainer import scoring
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.loop import Trainer, train
from plain_loop import completion_logprobs, load
from trainer_cases import NOT_INTERPRETED, Lab, metrics, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def test_a_run_logs_metrics_samples_report_and_tensorboard_events(lab: Lab, tmp_path: Path) -> None:
    student = train(
        lab.config(tmp_path, "data.evaluation_prompts=4", "trackers=[tensorboard]", "rollouts.top_k=3")
    )
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {"loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"} <= {*row}
        assert 0 <= row["top1_agreement"] <= 1
        assert 0 <= row["truncated"] <= 1
        assert 1 <= row["completion_length"] <= 6
        assert row["tokens"] == pytest.approx(8 * row["completion_length"])
        spent = row["rollout_seconds"] + row["teacher_seconds"] + row["update_seconds"]
        assert min(row["rollout_seconds"], row["teacher_seconds"], row["update_seconds"]) > 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / spent)
        assert row["memory_gib"] > 0
    sampled = metrics(tmp_path, "evaluation")[-1]["samples"]
    assert len(sampled) == 3
    assert [{*sample} for sample in sampled] == [{"prompt", "completion"}] * 3
    assert all(sample["prompt"] for sample in sampled)
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))
    transformers.AutoModelForCausalLM.from_pretrained(student)
    transformers.AutoTokenizer.from_pretrained(student)


def test_losses_of_on_policy_and_off_policy_slices_are_apart(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=4", "lmbda=0.5", "gradient_accumulation_steps=2"))
    seen: set[tuple[bool, bool]] = set()
    for row in metrics(tmp_path):
        parts = [(row.get(f"{p}/loss", 0), row.get(f"{p}/tokens", 0)) for p in ("on_policy", "off_policy")]
        assert sum(tokens for _, tokens in parts) == row["tokens"]
        assert sum(loss * tokens for loss, tokens in parts) == pytest.approx(row["loss"] * row["tokens"])
        seen.add(("on_policy/loss" in row, "off_policy/loss" in row))
    assert len(seen) > 1


FULL = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
TOPK = {*(f"topk_{name}" for name in FULL), "student_mass", "teacher_mass"}


def restricted(lab: Lab, output: Path, targets: str, tail: str, *overrides: str) -> Any:
    """Return the settings of a run with a local top-k teacher."""
    teacher = f"teacher={{model: {lab.teacher}, targets: {targets}, k: 4, tail: {tail}}}"
    return lab.config(output, "lmbda=0", "data.evaluation_prompts=6", teacher, *overrides)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize("targets", ["topk", "student_topk"])
def test_masses_are_what_each_model_gives_to_the_k_tokens(
    lab: Lab, tmp_path: Path, targets: str, tail: str
) -> None:
    trainer = Trainer(restricted(lab, tmp_path, targets, tail, "temperature=1.5"))
    buffer = trainer.fill_buffer()
    samples = [s for s in buffer[0] if s.completion]
    models = load(str(lab.student)), load(str(lab.teacher))
    student, teacher = (
        torch.cat([completion_logprobs(m, s.prompt, s.completion) for s in samples]) for m in models
    )
    student, teacher = ((logprobs / 1.5).softmax(-1).detach() for logprobs in (student, teacher))
    ids = (teacher if targets == "topk" else student).topk(4).indices
    want = {"student_mass": student, "teacher_mass": teacher}
    want = {name: float(p.gather(-1, ids).sum(-1).mean()) for name, p in want.items()}
    got = trainer.update(buffer)
    if (targets, tail) == ("topk", "renormalize"):
        del want["student_mass"]  # this loss computes no other logits than those of the k tokens
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-4)
    assert {*got} & {*FULL, *TOPK} == TOPK - ({"student_mass"} - {*want})


def test_the_students_mass_costs_no_product_of_its_own(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    topk_targets = scoring.topk_targets
    monkeypatch.setattr(scoring, "topk_targets", lambda *a: (calls.append(1), topk_targets(*a))[1])
    for targets, products in (("topk", 0), ("student_topk", 1)):  # the one that finds the student's top k
        for tail in ("bucket", "renormalize", "truncate"):
            trainer = Trainer(restricted(lab, tmp_path, targets, tail))
            trainer.update(trainer.fill_buffer())
            assert len(calls) == products
            calls.clear()


def test_evaluations_with_a_local_teacher_are_exact_whatever_the_targets(lab: Lab, tmp_path: Path) -> None:
    """The first evaluation is of the same student and the same completions."""
    same = ("lmbda=1", "steps=1", "beta=1")
    train(lab.config(tmp_path / "full", "data.evaluation_prompts=6", *same))
    runs = {
        targets: restricted(lab, tmp_path / targets, targets, "bucket", *same)
        for targets in ("topk", "student_topk")
    }
    without_effect = ("token_weight.entropy_below=1", "divergence=skew_forward_kl", "alpha=0.2")
    sampled = (*same[:2], "data.evaluation_prompts=6", "objective=sampled", *without_effect)
    runs["sampled"] = lab.config(tmp_path / "sampled", *sampled)
    want = metrics(tmp_path / "full", "evaluation")[0]
    for name, config in runs.items():
        train(config)
        got = metrics(tmp_path / name, "evaluation")[0]
        assert [got[metric] for metric in FULL] == pytest.approx([want[metric] for metric in FULL])
        assert got["full_loss"] == pytest.approx(want["loss"])
        assert not {"loss", *TOPK} & {*got}
        [step] = metrics(tmp_path / name)
        assert "loss" in step
        assert not {"full_loss", *FULL} & {*step}


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_evaluations_with_a_stored_teacher_have_the_names_of_the_top_k(
    lab: Lab, tmp_path: Path, tail: str
) -> None:
    config = restricted(lab, tmp_path / "store", "topk", tail, "steps=1")
    store_teacher(config, tmp_path / "folder", "float32")
    stored = f"teacher={{stored: {tmp_path}/folder, targets: topk, k: 4, tail: {tail}}}"
    train(lab.config(tmp_path / "run", "lmbda=0", "data.evaluation_prompts=6", "steps=1", stored))
    first, last = metrics(tmp_path / "run", "evaluation")
    assert {*first} & {"loss", "full_loss", *FULL, *TOPK} == {"loss", *TOPK}
    assert 0 < first["student_mass"] < 1
    assert first["student_mass"] != last["student_mass"]


def test_the_learning_rate_is_the_one_that_the_step_used(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "warmup_steps=2", "steps=4", "schedule=linear"))
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])
