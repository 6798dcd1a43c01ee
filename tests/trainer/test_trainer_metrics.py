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
