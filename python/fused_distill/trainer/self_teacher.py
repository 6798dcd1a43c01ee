"""A teacher that follows the student: a copy of it every few steps, or an average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .config import TeacherConfig
from .targets import Teacher
from .teachers import LocalTeacher


class Following:
    """What is trained of the student, and the teacher's copy of it, which is part of a checkpoint."""

    def __init__(self, settings: TeacherConfig, teacher: PreTrainedModel, student: PreTrainedModel):
        self._refresh_every, self._ema = settings.refresh_every, settings.ema
        pairs = zip(teacher.parameters(), student.parameters(), strict=True)
        trained = [(own, theirs) for own, theirs in pairs if theirs.requires_grad]
        self._own, self._student = ([pair[i] for pair in trained] for i in range(2))

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Follow the student after its optimizer step with this number, which counts from 1."""
        for own, student in zip(self._own, self._student, strict=True):
            if self._ema is not None:
                own.lerp_(student, 1 - self._ema)
            elif self._refresh_every is not None and step % self._refresh_every == 0:
                own.copy_(student)

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's weights."""
        return {"parameters": [parameter.detach() for parameter in self._own]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the teacher's weights."""
        parameters: list[Tensor] = state["parameters"]
        for own, saved in zip(self._own, parameters, strict=True):
            own.copy_(saved)


def following_teachers(
    teachers: Mapping[str, Teacher], student: PreTrainedModel, accelerator: Accelerator
) -> list[Following]:
    """Return what follows the student, a part of the accelerator's checkpoints from now on."""
    found = [
        Following(teacher.settings, teacher.model, student)
        for teacher in teachers.values()
        if isinstance(teacher, LocalTeacher) and teacher.settings.follows_student
    ]
    accelerator.register_for_checkpointing(*found)
    return found
