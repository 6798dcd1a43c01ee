"""Fixtures of the trainer's tests: two tiny models, a dataset, settings, and readers of a run's output."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import INTERPRETED

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fused_distill.rollouts.transformers import TransformersRollouts  # noqa: E402
from fused_distill.trainer.config import TrainConfig, load_config  # noqa: E402

NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="tests the trainer, not the kernels")
SETTINGS = """
steps: 3
prompts_per_step: 8
learning_rate: 0.01
data: {evaluation_prompts: 0}
rollouts: {max_completion_length: 6}
"""


class Lab(NamedTuple):
    """Two models and a dataset."""

    student: Path
    teacher: Path  # wider, and its LM head has more rows than there are tokens
    data: Path

    def config(self, output: Path, *overrides: str) -> TrainConfig:
        """Return the settings of a run; its teacher is the local one unless overrides name a server."""
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.yaml").write_text(SETTINGS)
        paths = [f"student={self.student}", f"output={output}", f"data.path={self.data}"]
        if not any(override.startswith("teacher.url") for override in overrides):
            paths.append(f"teacher.model={self.teacher}")
        return load_config(output / "settings.yaml", [*paths, *overrides])


def save_model(path: Path, tokenizer: Path, **changes: Any) -> Path:
    """Save a random model whose distributions are far from uniform."""
    torch.manual_seed(len(changes))
    config = transformers.AutoConfig.from_pretrained(tokenizer)
    config.update({"num_hidden_layers": 2, "layer_types": config.layer_types[:2], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data.mul_(20)
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def lab(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    draw = random.Random(0)

    def random_text(min_length: int, max_length: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(min_length, max_length)))

    rows = [{"prompt": random_text(2, 12), "completion": random_text(0, 8)} for _ in range(40)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Lab(
        save_model(folder / "student", tiny_model),
        save_model(folder / "teacher", tiny_model, hidden_size=24, vocab_size=104),
        data,
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a file of JSON Lines and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompts(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the lab's data, in which two of three rows have another prompt for the teacher."""
    rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["teacher_prompt"] = f"hint {i} {row['prompt']}" if i % 3 else None
    return write_rows(tmp_path_factory.mktemp("prompts") / "data.jsonl", rows)


class FakeServer:
    """Stands for VllmRollouts on a server that generates with the weights that it received."""

    def __init__(self, *_: Any, **__: Any):
        self.versions: list[str] = []  # what was done, in order

    def generate(self, prompts: Any, sampling: Any) -> Any:
        self.versions.append("generate")
        return TransformersRollouts(self.model).generate(prompts, sampling)

    def sync_from_disk(self, folder: Path, expected: Any) -> None:
        self.versions.append("sync")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def verify_weights(self, expected: Any) -> None:
        """Accept them."""


def metrics(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the lines of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(output: Path) -> list[float]:
    """Return the loss of every training step."""
    return [row["loss"] for row in metrics(output)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    """Assert that two runs have bitwise the same losses and the same student."""
    assert losses(output) == losses(expected)
    own, others = weights(output / "student"), weights(expected / "student")
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in others)
