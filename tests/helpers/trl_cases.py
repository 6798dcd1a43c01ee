"""TRL's two trainers on tiny models, a fake teacher server, and runs to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
local = pytest.importorskip("trl.trainer.distillation_trainer")
server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")

PROMPTS = ["ab", "Hello there", "x y z", "Why?", "q", "1 2 3", "zz top", "!"]
SERVED = {"loss_top_k": 1}


class Run(NamedTuple):
    """What a training run computes."""

    losses: list[float]
    entropies: list[float]
    parameters: list[Tensor]  # after the last step
    gradients: list[dict[str, Tensor]]  # of each step


def make_trainer(
    model: Path,
    output: Path,
    beta: float = 0.5,
    *,
    layers: int = 2,
    peft: Any = None,
    tied: bool = True,
    **options: Any,
) -> Any:
    """Return a trainer with a local teacher, or for loss_top_k with a teacher behind a fake server.

    The former is in float32, the latter in float64, because TRL's float32 tails lose digits.
    """
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(model)
    config.update(
        {
            "num_hidden_layers": layers,
            "layer_types": config.layer_types[:layers],
            "tie_word_embeddings": tied,
        }
    )
    student = transformers.AutoModelForCausalLM.from_config(config)
    config.hidden_size = 24
    teacher = transformers.AutoModelForCausalLM.from_config(config).eval()
    for model_ in (student, teacher):  # random models are nearly uniform
        for weight in {model_.get_input_embeddings().weight, model_.get_output_embeddings().weight}:
            weight.data.mul_(20)
    settings = {
        "output_dir": str(output),
        "beta": beta,
        "temperature": 0.8,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "generation_kwargs": {"sequence_bias": [[[1], 5.0]]},  # some completions end
        # Where a gradient should be 0, Adam would turn rounding errors into full steps.
        "optim": "sgd",
        "learning_rate": 0.02,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    arguments = {
        "model": student,
        "peft_config": peft,
        "train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS * 10}),
        "processing_class": transformers.AutoTokenizer.from_pretrained(model, padding_side="left"),
    }
    if "loss_top_k" not in options:
        args = trl.DistillationConfig(**settings)
        return trl.DistillationTrainer(teacher_model=teacher, args=args, **arguments)
    student.double()
    args = trl.experimental.server_distillation.ServerDistillationConfig(
        teacher_model_server_url="http://nowhere", **settings
    )
    client = FakeClient(teacher.double())
    with mock.patch("trl.generation.vllm_client.VLLMClient", return_value=client):
        trainer = server.ServerDistillationTrainer(args=args, **arguments)
    trainer._get_teacher_token_logprobs_from_server = Float64TeacherLogprobs(trainer)
    return trainer


def lora(**options: Any) -> Any:
    """Return the settings of adapters that are not zero when training begins."""
    return pytest.importorskip("peft").LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


class Float64TeacherLogprobs:
    """Converts to float64 what the trainer makes of the server's response."""

    def __init__(self, trainer: Any) -> None:
        self.original = trainer._get_teacher_token_logprobs_from_server

    def __call__(self, inputs: dict[str, Any], aligned_prompt_length: int) -> dict[str, Tensor]:
        answer = self.original(inputs, aligned_prompt_length)
        return {name: t.double() if t.is_floating_point() else t for name, t in answer.items()}


class FakeClient:
    """Answers as TRL's VLLMClient does, from a model in this process."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, length in zip(sequences, prompt_lengths, strict=True):
            tokens = torch.tensor([sequence])
            with torch.no_grad():
                logits = self.teacher(input_ids=tokens).logits[0, length - 1 : -1]
            logprobs = torch.log_softmax(logits / temperature, -1)
            top = logprobs.topk(top_logprobs)
            answers["logprobs"].append(top.values.tolist())
            answers["logprob_token_ids"].append(top.indices.tolist())
            answers["actual_logprobs"].append(logprobs.gather(-1, tokens[0, length:, None]).tolist())
        return answers


class Gradients(transformers.TrainerCallback):
    """Records the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append(
            {name: gathered(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        )


def training_inputs(trainer: Any) -> dict[str, Any]:
    """Return the inputs of a training step: completions of different lengths."""
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in PROMPTS[:4]])
    inputs["completion_mask"][0, -3:] = 0
    return inputs


def gathered(tensor: Any) -> Tensor:
    """Return a copy, of a DTensor with all shards together."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(trainer: Any) -> Run:
    """Train and return what was computed, having checked that completions differ in length."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == len(gradients.steps) == trainer.args.max_steps
    assert any(e["completions/min_length"] < e["completions/max_length"] for e in steps)
    entropies = [entry["entropy"] for entry in steps if "entropy" in entry]
    parameters = [gathered(p) for p in trainer.model.parameters()]
    return Run([entry["loss"] for entry in steps], entropies, parameters, gradients.steps)


def assert_equal_runs(ours: Run, peer: Run, tolerance: float) -> None:
    """Compare losses and entropies, logged in float32, and gradients relative to their largest entry."""
    assert ours.losses == pytest.approx(peer.losses, rel=1e-6)
    assert ours.entropies == pytest.approx(peer.entropies, rel=1e-6)
    torch.testing.assert_close(ours.parameters, peer.parameters, rtol=tolerance, atol=tolerance)
    for step, expected in zip(ours.gradients, peer.gradients, strict=True):
        assert step.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                step[name], gradient, rtol=0, atol=10 * tolerance * float(gradient.abs().max()), msg=name
            )
