"""What a run says at its start: what it loads, and with which models, data and devices it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import TeacherConfig
from .targets import Teacher
from .teachers import LocalTeacher

if TYPE_CHECKING:
    from .loop import Trainer


def header(run: Trainer) -> str:
    """Return a line each for the student, the teacher, the device, the data and the steps of a run."""
    config, start = run.config, run.step
    resumed = f"resumed from the checkpoint of step {start}, " if start else ""
    rows = [
        ("student", f"{config.student}: {_student_size(run)}"),
        *((f"teacher {name}".rstrip(), _teacher(teacher)) for name, teacher in run.teachers.items()),
        ("device", _device(run)),
        ("data", f"{len(run.samples):,} samples for training, {len(run.held_out):,} held out"),
        ("steps", f"{resumed}{start} of {config.steps} done, {config.prompts_per_step} prompts each"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _student_size(run: Trainer) -> str:
    total, trained = n_parameters(run.model), n_parameters(run.model, trained=True)
    lora = "" if run.config.lora is None else f" by LoRA of rank {run.config.lora.r}"
    return f"{total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained{lora}"


def _teacher(teacher: Teacher) -> str:
    settings = teacher.settings
    shown = settings.model_dump(mode="json")  # without credentials
    source = settings.model or shown["url"] or shown["stored"]
    name = ", ".join(source) if isinstance(source, list) else str(source)
    if settings.is_self:
        name += f" ({_following(settings)})"
    size = ""
    if isinstance(teacher, LocalTeacher):
        dtype = str(teacher.model.dtype).removeprefix("torch.")
        size = f"{n_parameters(teacher.model):,} parameters in {dtype}, "
    k = "" if settings.targets == "full" else f", k {settings.k}"
    return f"{name}: {size}targets {settings.targets}{k}"


def _following(settings: TeacherConfig) -> str:
    if settings.ema is not None:
        return f"average of the student's weights, ema {settings.ema:g}"
    if settings.refresh_every is not None:
        return f"the student, copied every {settings.refresh_every} steps"
    return "the student at the start"


def _device(run: Trainer) -> str:
    kind = str(run.accelerator.distributed_type).rsplit(".", 1)[-1]
    processes = "1 process" if run.processes == 1 else f"{run.processes} processes ({kind})"
    return f"{run.device}, {processes}, precision {run.config.precision}"


def n_parameters(model: Any, trained: bool = False) -> int:
    """Return the number of a model's parameters, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
