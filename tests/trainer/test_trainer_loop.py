"""Tests of the trainer's steps in one process: loss, buffer, updates and diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.cli import main
from fused_distill.trainer.data import Sample
from fused_distill.trainer.loop import NonFiniteLoss, Trainer, train
from trainer_cases import NOT_INTERPRETED, Lab, losses, metrics, save_model, transformers, weights
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def reference_step(trainer: Trainer, samples: list[Sample]) -> float:
    """Return the mean over valid tokens of the JSD of the models' logits, computed sample by sample."""
    divergences = []
    for s in samples:
        tokens = torch.tensor([[*s.prompt, *s.completion]])
        logits = [
            m(input_ids=tokens).logits[0, len(s.prompt) - 1 : -1, :98]
            for m in (trainer.model, teacher(trainer))
        ]
        log_s, log_t = (x.double().log_softmax(-1) for x in logits)
        log_m = (log_s.exp() / 2 + log_t.exp() / 2).log()
        jsd = (log_t.exp() * (log_t - log_m) + log_s.exp() * (log_s - log_m)).sum(-1) / 2
        divergences += jsd.tolist()
    return sum(divergences) / len(divergences)


def teacher(trainer: Trainer) -> Any:
    return trainer.teachers[""].model  # pyright: ignore[reportAttributeAccessIssue]


def test_the_loss_is_the_jsd_of_the_models_logits(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "gradient_accumulation_steps=2"))
    buffer = trainer.fill_buffer()
    want = reference_step(trainer, [sample for part in buffer for sample in part])
    assert trainer.update(buffer)["loss"] == pytest.approx(want, rel=1e-5)


def test_only_completion_positions_reach_the_lm_heads(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_distill.chunked.lm_head import LMHead

    rows = []
    project = LMHead.project

    def counted(self: LMHead, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return project(self, hidden, *rest)

    monkeypatch.setattr(LMHead, "project", counted)
    trainer = Trainer(lab.config(tmp_path, "lmbda=0"))
    [samples] = trainer.fill_buffer()
    trainer.update([samples])
    assert sum(rows) == 2 * sum(len(s.completion) for s in samples)  # student and teacher


def test_a_step_does_not_depend_on_the_number_of_slices(lab: Lab, tmp_path: Path) -> None:
    for slices in (1, 2, 4):
        train(lab.config(tmp_path / f"{slices}", "lmbda=0", f"gradient_accumulation_steps={slices}"))
    one_slice = weights(tmp_path / "1" / "student")
    for slices in (2, 4):
        assert losses(tmp_path / f"{slices}") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        split = weights(tmp_path / f"{slices}" / "student")
        for name in one_slice:
            torch.testing.assert_close(split[name], one_slice[name], rtol=1e-4, atol=1e-4)


def test_completions_of_a_prompt_stay_in_one_slice(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(tmp_path, "gradient_accumulation_steps=4", "rollouts.num_generations=3")
    buffer = Trainer(config).fill_buffer()
    owners: dict[int, set[int]] = {}
    for i, part in enumerate(buffer):
        for sample in part:
            owners.setdefault(sample.row, set()).add(i)
    assert sum(len(part) for part in buffer) == 24
    assert [len(slices) for slices in owners.values()] == [1] * 8


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_lmbda_is_the_fraction_of_on_policy_slices(lab: Lab, tmp_path: Path, lmbda: float) -> None:
    trainer = Trainer(lab.config(tmp_path, f"lmbda={lmbda}", "gradient_accumulation_steps=8"))
    data = {tuple(row["prompt"]): row["completion"] for row in trainer.samples.to_list()}
    on_policy = 0
    for trainer.step in range(25):
        buffer = trainer.fill_buffer()
        assert len(buffer) == 8
        on_policy += sum(any(s.completion != data[tuple(s.prompt)] for s in part) for part in buffer)
    assert on_policy / 200 == pytest.approx(lmbda, abs=0.1)


def test_an_epoch_uses_every_prompt_once(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "lmbda=0.5", "gradient_accumulation_steps=4"))
    rows: list[int] = []
    for trainer.step in range(5):
        rows += [s.row for part in trainer.fill_buffer() for s in part]
    assert sorted(rows) == list(range(40))


@pytest.mark.parametrize("completions", [[[], []], [[], [7, 1]], [[1], [8]]])
def test_completions_may_be_empty(lab: Lab, tmp_path: Path, completions: list[list[int]]) -> None:
    trainer = Trainer(lab.config(tmp_path))
    samples = [Sample(i, [5, 6], c) for i, c in enumerate(completions)]
    step_metrics = trainer.update([samples[:1], samples[1:]])
    assert step_metrics["tokens"] == sum(map(len, completions))
    assert (step_metrics["loss"] > 0) == (step_metrics["tokens"] > 0)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_step_without_valid_tokens_changes_no_weight(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.update([[Sample(0, [5], [])]])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": 3.0}, {"final_logit_softcapping": None}])
def test_the_softcap_is_read_from_the_students_config(
    lab: Lab, tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    student = save_model(tmp_path / "student", tiny_model, **changes)
    trainer = Trainer(lab.config(tmp_path, f"student={student}", "lmbda=0"))
    buffer = trainer.fill_buffer()
    assert trainer.update(buffer)["loss"] != pytest.approx(0)
    trainer = Trainer(lab.config(tmp_path, f"student={student}", "lmbda=0"))
    assert trainer.update(buffer)["loss"] == pytest.approx(
        reference_step(Trainer(trainer.config), buffer[0]), rel=1e-5
    )


@pytest.mark.parametrize("targets", ["full", "topk", "student_topk"])
def test_a_non_finite_loss_names_the_tokens(lab: Lab, tmp_path: Path, targets: str) -> None:
    k = "" if targets == "full" else ", k: 4"
    trainer = Trainer(lab.config(tmp_path, f"teacher={{model: {lab.teacher}, targets: {targets}{k}}}"))
    with torch.no_grad():
        teacher(trainer).get_input_embeddings().weight[9] = torch.nan
        teacher(trainer).get_output_embeddings().weight = torch.nn.Parameter(
            torch.nan_to_num(teacher(trainer).get_output_embeddings().weight)
        )
    # Attention spreads the NaN of token 9 over its row.
    samples = [Sample(3, [5, 6], [7, 8]), Sample(4, [5, 6], [8, 9])]
    with pytest.raises(NonFiniteLoss) as error:
        trainer.update([samples])
    assert str(error.value) == (
        "the loss is not finite at 2 of 4 tokens; "
        "row 4 of the data, token 2 ('%'): the teacher's numbers are NaN; "
        "row 4 of the data, token 3 ('&'): the teacher's numbers are NaN"
    )


def test_a_diverged_student_is_told_from_a_broken_teacher_once(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path))
    model: Any = trainer.model
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.nan
    with pytest.raises(NonFiniteLoss) as error:
        trainer.update([[Sample(4, [5, 6], [8, 9, 9])]])
    assert str(error.value) == (
        "the loss is not finite at 3 of 3 tokens; row 4 of the data, token 2 ('%'); "
        "row 4 of the data, token 3 ('&'); row 4 of the data, token 4 ('&'); "
        "the teacher's numbers are sound. If the loss grew before, set a lower learning_rate"
    )


def test_a_non_finite_loss_changes_no_weight(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "gradient_accumulation_steps=2"))
    with torch.no_grad():
        teacher(trainer).get_output_embeddings().weight[9] = torch.nan
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteLoss, match="the loss is not finite at"):
        trainer.update(trainer.fill_buffer())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_non_finite_gradient_changes_no_weight(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path))
    trained = next(trainer.model.parameters())
    trained.register_hook(lambda grad: grad * torch.inf)
    before = trained.detach().clone()
    with pytest.raises(NonFiniteLoss, match="its gradient is not"):
        trainer.update(trainer.fill_buffer())
    assert torch.equal(before, trained)


def test_the_loss_on_held_out_prompts_falls(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=12", "data.evaluation_prompts=8", "evaluate_every=4", "beta=1"))
    rows = metrics(tmp_path, "evaluation")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_lora_trains_adapters_only_and_they_load_with_peft(lab: Lab, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = lab.config(tmp_path, "lora.r=2", "lmbda=0")
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.update(trainer.fill_buffer())
    trainer.update(trainer.fill_buffer())
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved == {name for name in before if "lora_" in name}

    student = train(config)
    base = transformers.AutoModelForCausalLM.from_pretrained(lab.student, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, student)
    adapted = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
    assert any(p.abs().sum() > 0 for p in adapted.values())
    assert losses(tmp_path)[2] != losses(tmp_path)[0]


def test_bfloat16_is_near_float32(lab: Lab, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    train(lab.config(tmp_path / "fp32", "lmbda=0"))
    AcceleratorState._reset_state(True)
    try:
        train(lab.config(tmp_path / "bf16", "lmbda=0", "precision=bf16"))
    finally:
        AcceleratorState._reset_state(True)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def test_the_command_prints_the_diagnosis_and_saves_no_checkpoint(
    lab: Lab, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_model(tmp_path / "teacher", tiny_model, hidden_size=24)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    model.get_input_embeddings().weight.data[9] = torch.nan
    model.save_pretrained(broken)
    lab.config(tmp_path)
    paths = [
        f"student={lab.student}",
        f"teacher.model={broken}",
        f"data.path={lab.data}",
        f"output={tmp_path}",
    ]
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "settings.yaml"), *paths])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fused-distill train: teacher's loss: the loss is not finite at ")
    assert "the teacher's numbers are NaN" in line
    assert not list(tmp_path.glob("checkpoints/*"))
