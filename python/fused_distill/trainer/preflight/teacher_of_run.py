"""The teachers of a run with their names and settings, as the checks need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..config import TeacherConfig
from ..data import Sample
from ..targets import Teacher

if TYPE_CHECKING:
    from ..loop import Trainer


class TeacherOfRun(NamedTuple):
    """A teacher of a run."""

    name: str  # empty if the run has one teacher
    settings: TeacherConfig
    teacher: Teacher

    @property
    def title(self) -> str:
        """Return what the findings call it."""
        return f"teacher {self.name}".rstrip()

    def scores(self, sample: Sample) -> bool:
        """Return whether it scores a sample."""
        return sample.teacher == self.name


def teachers_of(run: Trainer) -> list[TeacherOfRun]:
    """Return the teachers of a run."""
    return [TeacherOfRun(name, teacher.settings, teacher) for name, teacher in run.teachers.items()]
