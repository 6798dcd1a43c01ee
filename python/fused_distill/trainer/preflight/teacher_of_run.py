"""The teachers of a run with their names and settings, as the checks need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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

    @property
    def tokenizer_name(self) -> str | None:
        """Return the path or name of its tokenizer, None if it is unknown."""
        settings: Any = self.settings
        return getattr(settings, "tokenizer_name", settings.model)

    @property
    def has_own_format(self) -> bool:
        """Return whether its own chat template renders its prompts."""
        return getattr(self.settings, "chat_template", "student") == "own"

    def scores(self, sample: Sample) -> bool:
        """Return whether it scores a sample."""
        return getattr(sample, "teacher", "") == self.name


def teachers_of(run: Trainer) -> list[TeacherOfRun]:
    """Return the teachers of a run."""
    trainer: Any = run
    teachers: dict[str, Any] = getattr(trainer, "teachers", None) or {"": trainer.teacher}
    return [TeacherOfRun(n, getattr(t, "settings", run.config.teacher), t) for n, t in teachers.items()]
