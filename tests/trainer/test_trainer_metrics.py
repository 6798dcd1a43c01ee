"""Tests of what a run logs: metrics.jsonl, samples, trackers and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from fused_distill.trainer.loop import train
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
