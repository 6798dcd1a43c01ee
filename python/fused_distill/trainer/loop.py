"""On-policy distillation, read from top to bottom: `train`."""

from __future__ import annotations

import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoTokenizer, get_scheduler

from .._settings import DistillStats
from ..output_heads import output_head
from ..rollout_buffer import split_on_groups
from .checkpoint import latest_checkpoint, save_checkpoint
from .config import ConfigError, TrainConfig
from .data import Batch, Prompt, Sample, load_prompts, order
from .journal import Journal
from .student import Writer, hidden_states, inside_forward, load_student
from .targets import FullTargets, TopKTargets, distillation_loss
from .teachers import load_teacher, top_ids

Sums = Any  # a Counter of floats, which its type does not allow

BATCH = 8  # samples of an evaluation's forward pass
SHOWN_SAMPLES = 3


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message says at which tokens."""


class Trainer:
    """A run of `train`: models, data and how a batch becomes a loss."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            log_with=[*config.trackers] or None,
            project_dir=str(config.output),
        )
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        slices = self.processes * config.gradient_accumulation_steps
        if config.prompts_per_step % slices:
            raise ConfigError(
                f"prompts_per_step: {config.prompts_per_step} must be a multiple of processes times "
                f"gradient_accumulation_steps, {slices}"
            )
        self.device = self.accelerator.device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.student)
        self.prompts, self.held_out = load_prompts(config, self.tokenizer)
        self.teacher = load_teacher(config, self.tokenizer, self.device)
        torch.manual_seed(config.seed)
        model = load_student(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: Any = self.accelerator.unwrap_model(self.wrapped)
        self.schedule: Any = get_scheduler(config.schedule, self.optimizer, config.warmup_steps, config.steps)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.writer = Writer(self.model, config)
        self.step = 0
        self.seconds: Sums = Counter()
        self.stopping = False

    def fill_buffer(self) -> list[list[Sample]]:
        """This process's samples of one step, a list for each slice of the gradient accumulation."""
        config = self.config
        start = self.step * config.prompts_per_step
        mine = list(islice(order(self.prompts, config.seed, start), config.prompts_per_step))
        mine = mine[self.rank :: self.processes]
        each = len(mine) // config.gradient_accumulation_steps
        coin = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)  # the same in every process
        slices = config.gradient_accumulation_steps
        on_policy = int((torch.rand(slices, generator=coin) < config.lmbda).sum())
        student_writes, data_has = mine[: on_policy * each], mine[on_policy * each :]
        samples = [Sample(p.row, p.tokens, p.completion or []) for p in data_has]
        filled = [samples[i : i + each] for i in range(0, len(samples), each)]
        if on_policy:
            filled += self.written(student_writes, on_policy)
        return filled

    def written(self, prompts: list[Prompt], slices: int) -> list[list[Sample]]:
        """The student's completions of the prompts, cut into slices between prompts."""
        seed = (self.config.seed << 40) + (self.step * self.processes + self.rank << 16)
        found = self.writer.write(prompts, seed)
        return [[one.sample for one in part] for part in split_on_groups(found, slices)]

    def loss(self, batch: Batch, normalizer: float) -> tuple[Tensor, DistillStats]:
        """The batch's share of the step's loss, and its statistics a token."""

        def student_ids() -> Tensor:
            def ids() -> TopKTargets:
                hidden, head = hidden_states(self.model, batch), output_head(self.model)
                return top_ids(hidden, head, self.config.teacher.k, batch.mask, self.config.temperature)

            with torch.no_grad():
                return inside_forward(self.wrapped, self.model, ids).ids

        with self.accelerator.autocast():
            with self.timed("teacher_seconds"):
                targets = self.teacher.targets(batch, student_ids)

            def compute() -> tuple[Tensor, DistillStats]:
                hidden, head = hidden_states(self.model, batch), output_head(self.model)
                return distillation_loss(hidden, head, targets, batch.mask, self.config, normalizer)

            loss, stats = inside_forward(self.wrapped, self.model, compute)
        if not loss.isfinite():
            raise NonFiniteLoss(self.diagnosis(batch, targets, stats))
        return loss, stats

    def diagnosis(self, batch: Batch, targets: FullTargets | TopKTargets, stats: DistillStats) -> str:
        """Which tokens of a batch have no finite divergence, and whose numbers are at fault."""
        bad = batch.mask & ~(stats.forward_kl.isfinite() & stats.reverse_kl.isfinite())
        lines = [f"the loss is not finite at {int(bad.sum())} of {int(batch.mask.sum())} tokens"]
        numbers = targets.hidden if isinstance(targets, FullTargets) else targets.logprobs
        broken = numbers.isnan().any(-1)
        for row, position in bad.nonzero().tolist()[:5]:
            token = batch.tokens[row, position + 1].item()
            whose = "the teacher's numbers are NaN" if broken[row, position] else "the teacher's are sound"
            lines.append(
                f"row {batch.samples[row].row} of the data, token {position + 1} "
                f"({self.tokenizer.decode([token])!r}): {whose}"
            )
        return "\n".join(lines)

    def update(self, slices: list[list[Sample]]) -> dict[str, float]:
        """One optimizer step; the loss is the mean over the tokens of all slices and processes."""
        batches = [Batch.of(samples, self.device) for samples in slices]
        counted = sum(int(batch.mask.sum()) for batch in batches)
        total = max(1.0, self.sum({"tokens": counted})["tokens"])
        sums: Sums = Counter()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, stats = self.loss(batch, total)
                with self.timed("update_seconds"):
                    # DDP and FSDP average over the processes; the tokens of all of them are in `total`.
                    self.accelerator.backward(loss * self.processes)
            sums.update(statistics(batch, stats) | {"loss": loss.item() * total})
        with self.timed("update_seconds"):
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        means = averages(self.sum(sums))
        return means | {"grad_norm": float(norm or 0.0), "learning_rate": self.schedule.get_last_lr()[0]}

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], list[str]]:
        """The loss on held-out prompts, and a few of the texts that it is of."""
        mine = self.held_out[self.rank :: self.processes]
        if self.config.teacher.stored is not None:
            samples = [Sample(p.row, p.tokens, p.completion or []) for p in mine]
        else:
            samples = [one.sample for one in self.writer.write(mine, seed=self.config.seed, n=1)]
        sums: Sums = Counter()
        for start in range(0, len(samples), BATCH):
            batch = Batch.of(samples[start : start + BATCH], self.device)
            loss, stats = self.loss(batch, 1.0)
            sums.update(statistics(batch, stats) | {"loss": loss.item()})
        texts = [self.tokenizer.decode([*s.prompt, *s.completion]) for s in samples[:SHOWN_SAMPLES]]
        return averages(self.sum(sums)), texts

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Over all processes."""
        names = sorted(values)
        numbers = torch.tensor([float(values[n]) for n in names], dtype=torch.float64, device=self.device)
        total: Any = self.accelerator.reduce(numbers, "sum")
        return dict(zip(names, total.tolist(), strict=True))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to what the step has spent on it."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started

    def save(self, folder: Path) -> None:
        """The student as transformers and vLLM load it."""
        state = self.accelerator.get_state_dict(self.wrapped)
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Distil a student; returns the folder that holds it.

    Args:
        config: of the run. Its output folder then holds student, metrics.jsonl, report.html and checkpoints.
        resume: go on from the last checkpoint in the output folder, if there is one.

    Raises:
        ConfigError: a setting that does not fit, by its key.
        NonFiniteLoss: with the tokens at which the loss is not finite.
    """
    run = Trainer(config)
    found = latest_checkpoint(config.output) if resume else None
    if found is not None:
        run.accelerator.load_state(str(found))
        run.step = int(found.name.removeprefix("step-"))
    journal = Journal(run.accelerator, config, run.step)

    def stop(*_: object) -> None:
        run.stopping = True

    signal.signal(signal.SIGTERM, stop)  # finish the step, save, end
    if run.step == 0 and run.held_out:
        journal.write(0, "evaluation", *run.evaluate())
    while run.step < config.steps:
        run.seconds.clear()
        torch.manual_seed(config.seed * 1_000_003 + run.step)  # of nothing but this step
        with run.timed("rollout_seconds"):
            if run.step % config.rollouts.sync_every == 0:
                run.writer.sync(run.save)
            slices = run.fill_buffer()
        metrics = run.update(slices)
        run.step += 1
        spent = sum(run.seconds.values())
        speed = {"tokens_per_second": metrics["tokens"] / spent, "memory_gib": memory_gib(run.device)}
        journal.write(run.step, "train", metrics | speed | dict(run.seconds))
        last = run.step == config.steps
        if run.held_out and (last or run.step % config.evaluate_every == 0):
            journal.write(run.step, "evaluation", *run.evaluate())
        stopping = run.sum({"stopping": run.stopping})["stopping"] > 0
        if last or stopping or run.step % config.save_every == 0:
            save_checkpoint(run.accelerator, config.output, run.step, config.keep_checkpoints)
        if stopping:
            break
    student = config.output / "student"
    run.save(student)
    journal.report()
    run.accelerator.end_training()
    return student


def statistics(batch: Batch, stats: DistillStats) -> dict[str, float]:
    """Sums over a batch's counted tokens and samples."""
    samples = batch.samples
    return {
        "tokens": int(batch.mask.sum()),
        "samples": len(samples),
        "completion_length": sum(len(s.completion) for s in samples),
        "truncated": sum(s.truncated for s in samples),
        **{
            name: float(getattr(stats, name).sum())
            for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
        },
    }


def averages(sums: dict[str, float]) -> dict[str, float]:
    """A token's, of lengths and truncation a sample's; the count of tokens as it is."""
    tokens, samples = sums.pop("tokens"), sums.pop("samples")
    of_samples = ("completion_length", "truncated")
    means = {n: v / max(samples if n in of_samples else tokens, 1) for n, v in sums.items()}
    return means | {"tokens": tokens}


def memory_gib(device: torch.device) -> float:
    """The most that this process has held: on the GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
