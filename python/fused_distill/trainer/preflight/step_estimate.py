"""An estimate of the time and the memory of a step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from ...huggingface.lm_head import LMHeadParams, checked_head
from ...plan import plan
from ...rollouts.base import Sampling
from ..data import Batch, Sample, sample_stream
from ..sharding import resident_bytes
from ..teachers import HiddenStateTeacher, LocalTeacher
from .finding import Finding, ok, warning
from .teacher_of_run import teachers_of

if TYPE_CHECKING:
    from ..loop import Trainer

_SAMPLES, _TOKENS = 8, 64  # of the timed update: samples at most, and completion tokens of each
_PROMPTS, _GENERATED = 32, 8  # of the timed generation: prompts at most, and tokens of each
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def estimate(run: Trainer, timed: bool) -> Finding:
    """Return the estimate for one process. All processes call this together.

    Args:
        run: the models and data.
        timed: run a small forward and backward pass, and generate a few tokens, and scale their times.
    """
    parts = _memory(run)
    activations = "activations not counted"
    speed = ""
    if timed:
        seconds, activation_bytes = _time(run)
        total = f"{sum(seconds.values()):.3g} s per step"
        speed = f"about {total} ({', '.join(f'{name} {s:.3g} s' for name, s in seconds.items())}); "
        if activation_bytes is not None:
            parts["activations"] = activation_bytes
            activations = "activations scaled from a small step"
    needed, available = sum(parts.values()), _device_memory(run.device)
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    text = f"estimate: {speed}{_size(needed)} of {_size(available)} ({shown}; {activations})"
    if needed > available:
        return warning(
            f"{text}. It does not fit: use lora, a smaller teacher or one on a server, FSDP, or "
            "more gradient_accumulation_steps"
        )
    return ok(text)


def _memory(run: Trainer) -> dict[str, int]:
    """Return the bytes of each kind in this process."""
    shards = run.processes if run.sharded else 1
    parameters = [*run.model.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad) // shards
    parts = {
        "student": sum(p.numel() * p.element_size() for p in parameters) // shards,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,  # two moments of AdamW in float32
    }
    for of_run in teachers_of(run):
        head: LMHeadParams | None = None
        teacher = of_run.teacher
        if isinstance(teacher, LocalTeacher):
            parts[of_run.title] = resident_bytes(teacher.model)
            head, _ = checked_head(teacher.model)
        elif isinstance(teacher, HiddenStateTeacher):
            head = teacher.head
            parts[f"LM head of {of_run.title}"] = head.weight.numel() * head.weight.element_size()
        if head is not None and of_run.settings.targets == "full":
            parts["loss"] = max(parts.get("loss", 0), _loss_buffers(run, head))
    return parts


def _loss_buffers(run: Trainer, teacher: LMHeadParams) -> int:
    """Return the bytes that the loss of one forward pass allocates."""
    config = run.config
    samples = config.prompts_per_step // run.processes // config.gradient_accumulation_steps
    n = max(1, round(samples * config.rollouts.num_generations * config.rollouts.max_completion_length))
    n = min(n, config.tokens_per_forward or n)
    weight = checked_head(run.model)[0].weight
    dtype = _DTYPES[config.precision]

    def empty(*shape: int, grad: bool = False) -> Any:
        return torch.empty(*shape, dtype=dtype, device="meta").requires_grad_(grad)

    return plan(
        empty(n, weight.shape[1], grad=True),
        empty(*weight.shape, grad=weight.requires_grad),
        empty(n, teacher.weight.shape[1]),
        empty(*teacher.weight.shape),
        device=run.device,
        beta=config.beta,
        temperature=config.temperature,
        vocab_size=min(len(weight), len(teacher.weight)),
    ).buffer_bytes


def _time(run: Trainer) -> tuple[dict[str, float], int | None]:
    """Return the seconds of the phases of a step, and on a CUDA device the bytes of its activations."""
    config, settings, on_cuda = run.config, run.config.rollouts, run.device.type == "cuda"
    prompts = config.prompts_per_step // run.processes
    drawn = [*islice(sample_stream(run.samples, config.seed, 0), min(prompts, _PROMPTS))]
    size = min(_SAMPLES, prompts // config.gradient_accumulation_steps)
    samples = [_with_completion(run, sample) for sample in drawn[:size]]
    batch = Batch.collate(samples, run.device)

    def update() -> None:
        run.accelerator.backward(run.loss(batch, 1.0)[0])
        run.optimizer.zero_grad()

    update()  # compiles
    before = torch.cuda.memory_allocated(run.device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    completions = prompts * (1 + config.lmbda * (settings.num_generations - 1))
    tokens = completions * (sum(len(s.prompt) for s in drawn) / len(drawn) + settings.max_completion_length)
    scale = tokens / sum(len(sample.tokens) for sample in samples)
    seconds: dict[str, float] = {"update": scale * min(_seconds(run, update) for _ in range(2))}
    activations = None
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(run.device) - before
        activations = int(peak * scale / config.gradient_accumulation_steps)
    if config.lmbda > 0 and settings.engine == "transformers":
        sampling = Sampling(1, min(_GENERATED, settings.max_completion_length), seed=0)
        lengths: list[int] = []

        def generate() -> None:
            found = run.rollouts.generate([sample.prompt for sample in drawn], sampling)
            lengths.append(max(len(completion.tokens) for completion in found))

        took = _seconds(run, generate)
        times = settings.max_completion_length / lengths[0] * completions / len(drawn)
        seconds["rollouts"] = config.lmbda * took * times
    return seconds, activations


def _with_completion(run: Trainer, sample: Sample) -> Sample:
    """Return a sample with a completion of its own tokens; a store knows the data's completions only."""
    if any(t.scores(sample) and t.settings.stored is not None for t in teachers_of(run)):
        return sample
    length = max(2, min(_TOKENS, run.config.rollouts.max_completion_length))
    return sample._replace(completion=[*islice(cycle(sample.completion or sample.prompt), length)])


def _seconds(run: Trainer, work: Callable[[], None]) -> float:
    def now() -> float:
        if run.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    start = now()
    work()
    return now() - start


def _device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a process may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
