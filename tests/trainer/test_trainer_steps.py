"""Steps of the trainer in one process: what a step's loss is, whatever the batch looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.cli import main
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Sample
from fused_distill.trainer.loop import NonFiniteLoss, Trainer, train
from fused_distill.trainer.student import load_student
from trainer_cases import ABOUT_THE_TRAINER, Lab, losses, metrics, save_model, transformers, weights
from trainer_cases import lab as lab

pytestmark = ABOUT_THE_TRAINER


def reference_step(trainer: Trainer, samples: list[Sample]) -> float:
    """The mean over counted tokens of the JSD of the models' own logits, sample by sample."""
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
    return trainer.teacher.model  # pyright: ignore[reportAttributeAccessIssue]


def test_the_loss_is_that_of_the_models_own_logits(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "gradient_accumulation_steps=2"))
    buffer = trainer.fill_buffer()
    want = reference_step(trainer, [sample for part in buffer for sample in part])
    assert trainer.update(buffer)["loss"] == pytest.approx(want, rel=1e-5)


def test_only_completion_positions_reach_the_heads(
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


def test_a_step_does_not_depend_on_how_its_batch_is_split(lab: Lab, tmp_path: Path) -> None:
    for slices in (1, 2, 4):
        train(lab.config(tmp_path / f"{slices}", "lmbda=0", f"gradient_accumulation_steps={slices}"))
    whole = weights(tmp_path / "1" / "student")
    for slices in (2, 4):
        assert losses(tmp_path / f"{slices}") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        split = weights(tmp_path / f"{slices}" / "student")
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-4)


def test_rollouts_are_of_the_whole_step_and_no_prompts_are_divided(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(tmp_path, "gradient_accumulation_steps=4", "rollouts.num_generations=3")
    buffer = Trainer(config).fill_buffer()
    owners: dict[int, set[int]] = {}
    for i, part in enumerate(buffer):
        for sample in part:
            owners.setdefault(sample.row, set()).add(i)
    assert sum(len(part) for part in buffer) == 24
    assert [len(own) for own in owners.values()] == [1] * 8


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_lmbda_is_the_share_of_slices_that_the_student_writes(lab: Lab, tmp_path: Path, lmbda: float) -> None:
    trainer = Trainer(lab.config(tmp_path, f"lmbda={lmbda}", "gradient_accumulation_steps=8"))
    data = {tuple(row["prompt"]): row["completion"] for row in trainer.samples}
    written = 0
    for trainer.step in range(25):
        buffer = trainer.fill_buffer()
        assert len(buffer) == 8
        own = [any(s.completion != data[tuple(s.prompt)] for s in part) for part in buffer]
        written += sum(own)
    assert written / 200 == pytest.approx(lmbda, abs=0.1)


def test_a_step_gives_every_prompt_once(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path, "lmbda=0.5", "gradient_accumulation_steps=4"))
    rows: list[int] = []
    for trainer.step in range(5):
        rows += [s.row for part in trainer.fill_buffer() for s in part]
    assert sorted(rows) == list(range(40))


@pytest.mark.parametrize("completions", [[[], []], [[], [7, 1]], [[1], [8]]])
def test_completions_may_be_empty(lab: Lab, tmp_path: Path, completions: list[list[int]]) -> None:
    trainer = Trainer(lab.config(tmp_path))
    samples = [Sample(i, [5, 6], c) for i, c in enumerate(completions)]
    found = trainer.update([samples[:1], samples[1:]])
    assert found["tokens"] == sum(map(len, completions))
    assert (found["loss"] > 0) == (found["tokens"] > 0)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_no_counted_token_moves_no_weight(lab: Lab, tmp_path: Path) -> None:
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
def test_a_non_finite_loss_is_diagnosed(lab: Lab, tmp_path: Path, targets: str) -> None:
    trainer = Trainer(lab.config(tmp_path, f"teacher={{model: {lab.teacher}, targets: {targets}, k: 4}}"))
    with torch.no_grad():
        teacher(trainer).get_input_embeddings().weight[9] = torch.nan
        teacher(trainer).get_output_embeddings().weight = torch.nn.Parameter(
            torch.nan_to_num(teacher(trainer).get_output_embeddings().weight)
        )
    # Attention gives the NaN of token 9 to the whole of its row.
    samples = [Sample(3, [5, 6], [7, 8]), Sample(4, [5, 6], [8, 9])]
    with pytest.raises(NonFiniteLoss) as error:
        trainer.update([samples])
    assert str(error.value) == (
        "the loss is not finite at 2 of 4 tokens; "
        "row 4 of the data, token 2 ('%'): the teacher's numbers are NaN; "
        "row 4 of the data, token 3 ('&'): the teacher's numbers are NaN"
    )


def test_a_gradient_that_is_not_finite_moves_no_weight(lab: Lab, tmp_path: Path) -> None:
    trainer = Trainer(lab.config(tmp_path))
    trained = next(trainer.model.parameters())
    trained.register_hook(lambda grad: grad * torch.inf)
    before = trained.detach().clone()
    with pytest.raises(NonFiniteLoss, match="its gradient is not"):
        trainer.update(trainer.fill_buffer())
    assert torch.equal(before, trained)


def test_the_loss_of_held_out_prompts_falls(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=12", "data.evaluation_prompts=8", "evaluate_every=4", "beta=1"))
    found = metrics(tmp_path, "evaluation")
    assert [row["step"] for row in found] == [0, 4, 8, 12]
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]


def test_metrics_samples_report_and_tensorboard(lab: Lab, tmp_path: Path) -> None:
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
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert sampled[0] not in ("", None)
    assert "://" not in page.replace(sampled[0], "")
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))
    transformers.AutoModelForCausalLM.from_pretrained(student)
    transformers.AutoTokenizer.from_pretrained(student)


def test_adapters_alone_are_trained_and_load_with_peft(lab: Lab, tmp_path: Path) -> None:
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


def test_adapters_are_float32_on_a_base_in_the_precision_of_products(lab: Lab, tmp_path: Path) -> None:
    model = load_student(lab.config(tmp_path, "lora.r=2", "precision=bf16"))
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_what_the_loss_does_not_reach_is_not_trained(lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
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
    ("frozen", "complaint"),
    [("[embd]", "frozen: no parameter has 'embd' in its name"), ("['']", "leaves nothing to train")],
)
def test_what_is_frozen_must_be_there_and_leave_something(
    lab: Lab, tmp_path: Path, frozen: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_student(lab.config(tmp_path, f"frozen={frozen}"))


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


def test_settings_in_the_report_are_those_of_the_run(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(tmp_path, "steps=1", "beta=0.125")
    train(config)
    page = (tmp_path / "report.html").read_text()
    assert "&quot;beta&quot;: 0.125" in page
    assert json.dumps(str(lab.student)).strip('"') in page


def test_the_command_ends_with_the_diagnosis_and_no_checkpoint(
    lab: Lab, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_model(tmp_path / "teacher", tiny_model, hidden_size=24)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    model.get_input_embeddings().weight.data[9] = torch.nan
    model.save_pretrained(broken)
    lab.config(tmp_path)
    own = [f"student={lab.student}", f"teacher.model={broken}", f"data.path={lab.data}", f"output={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "settings.yaml"), *own])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fused-distill train: the loss is not finite at ")
    assert "the teacher's numbers are NaN" in line
    assert not list(tmp_path.glob("checkpoints/*"))
