"""A server writes completions: it has the student's weights when it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.trainer.checkpoint import checkpoints
from fused_distill.trainer.loop import train
from trainer_cases import ABOUT_THE_TRAINER, Lab, losses, metrics, transformers
from trainer_cases import lab as lab

pytestmark = ABOUT_THE_TRAINER


class Server:
    """Stands for VllmRollouts: writes with the weights that it was sent."""

    sent: list[int]  # how often, when it wrote

    def __init__(self, url: str, token: str | None):
        self.count, Server.sent = 0, []

    def generate(self, prompts: Any, sampling: Any, groups: Any = None) -> Any:
        Server.sent.append(self.count)
        return TransformersRollouts(self.model).generate(prompts, sampling, groups)

    def sync_from_disk(self, folder: Path) -> None:
        self.count += 1
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_distill.trainer.loop.VllmRollouts", Server)


HOW = ("steps=5", "data.evaluation_prompts=4", "evaluate_every=3", "save_every=3")


def test_a_server_writes_what_the_student_itself_writes(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path / "own", *HOW))
    train(lab.config(tmp_path / "server", *HOW, "rollouts.url=http://x"))
    for kind in ("train", "evaluation"):
        of_own, of_server = (
            [row["loss"] for row in metrics(tmp_path / who, kind)] for who in ("own", "server")
        )
        assert of_server == of_own


def test_weights_are_sent_as_often_as_asked_and_for_every_evaluation(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, *HOW, "rollouts.url=http://x", "rollouts.sync_every=2"))
    # Evaluation at 0, steps 0 1 2, evaluation at 3, steps 3 4, evaluation at 5.
    assert Server.sent == [1, 1, 1, 2, 3, 3, 4, 5]


def test_a_resumed_run_sends_its_weights_first(lab: Lab, tmp_path: Path) -> None:
    how = ("steps=6", "save_every=3", "rollouts.url=http://x", "rollouts.sync_every=4")
    train(lab.config(tmp_path, *how))
    assert Server.sent == [1, 1, 1, 2, 3, 3]  # at step 3 for the checkpoint's sake
    whole = losses(tmp_path)
    for checkpoint in checkpoints(tmp_path)[1:]:
        checkpoint.rename(tmp_path / "away")
    train(lab.config(tmp_path, *how), resume=True)
    assert Server.sent == [1, 2, 2]
    assert losses(tmp_path) == whole
