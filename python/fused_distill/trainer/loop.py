"""On-policy distillation, read from top to bottom: `train`."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoTokenizer, get_scheduler

from ..chunked.teacher import wide_dtype
from ..huggingface.lm_head import LMHeadParams
from ..rollouts.base import RolloutEngine, Sampling
from ..rollouts.grouping import split_on_groups
from ..rollouts.transformers import TransformersRollouts
from ..rollouts.vllm import VllmRollouts
from ..stats import DistillStats
from .checkpoint import checkpoints, load_checkpoint, save_checkpoint
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data, order
from .journal import Journal
from .student import load_student, pretrained, through_student
from .targets import FullTargets, TopKTargets, distillation_loss, topk_targets
from .teachers import load_teacher

BATCH = 8  # samples of an evaluation's forward pass
SHOWN_SAMPLES = 3


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite; the message says at which tokens."""


class Trainer:
    """A run of `train`: models, data and how a batch becomes a loss."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=not torch.accelerator.is_available(),  # else a second process on the CPU runs on its own
            log_with=[*config.trackers] or None,
            # Longer than a client of a server is patient while the other processes wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            project_dir=str(config.output),
        )
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.sharded = self.accelerator.is_fsdp2
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.sharded:
            raise ConfigError("fsdp_version: must be 2 (of accelerate's settings)")
        slices = self.processes * config.gradient_accumulation_steps
        for key, value, unit in (
            ("prompts_per_step", config.prompts_per_step, slices),
            ("data.evaluation_prompts", config.data.evaluation_prompts, self.processes),
        ):
            if value % unit:
                raise ConfigError(
                    f"{key}: {value} must be a multiple of {unit}, as {self.processes} processes and "
                    f"{config.gradient_accumulation_steps} gradient_accumulation_steps share them"
                )
        self.device = self.accelerator.device
        self.tokenizer = pretrained(AutoTokenizer, "student", config.student)
        self.samples: Any
        with self.accelerator.local_main_process_first():  # the others read what it kept
            self.samples, self.held_out = load_data(config, self.tokenizer, completions=config.lmbda < 1)
        self.teacher = load_teacher(config, self.tokenizer, self.device)
        torch.manual_seed(config.seed)
        model = load_student(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: Any = self.accelerator.unwrap_model(self.wrapped)
        self.schedule: Any = get_scheduler(config.schedule, self.optimizer, config.warmup_steps, config.steps)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.server: VllmRollouts | None = None
        if config.rollouts.url is not None:
            self.server = VllmRollouts(config.rollouts.url, token=os.environ.get("FUSED_DISTILL_TOKEN"))
        elif self.sharded:
            register_fsdp_forward_method(self.wrapped, "generate")
        own = TransformersRollouts(self.model, synced=self.sharded, logprobs=False)
        self.engine: RolloutEngine = self.server or own
        self.step = 0
        self.sent_at: int | None = None  # the step whose weights the rollout server has
        self.seconds: Any = Counter()

    def fill_buffer(self) -> list[list[Sample]]:
        """This process's samples of one step, a list for each slice of the gradient accumulation."""
        config, slices = self.config, self.config.gradient_accumulation_steps
        start = self.step * config.prompts_per_step
        given = list(islice(order(self.samples, config.seed, start), config.prompts_per_step))
        mine = given[self.rank :: self.processes]
        each = len(mine) // slices
        coin = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)  # the same in every process
        on_policy = int((torch.rand(slices, generator=coin) < config.lmbda).sum())
        buffer = [mine[i * each : (i + 1) * each] for i in range(on_policy, slices)]
        if on_policy:
            seed = (config.seed << 40) + (self.step * self.processes + self.rank << 16)
            n = config.rollouts.num_generations
            buffer += self.write(mine[: on_policy * each], seed, n, on_policy)
        return buffer

    @torch.no_grad()
    def write(self, given: list[Sample], seed: int, n: int, slices: int = 1) -> list[list[Sample]]:
        """n completions of each prompt by the student as it is, cut into slices between prompts."""
        how = self.config.rollouts
        sampling = Sampling(n, how.max_completion_length, how.temperature, how.top_p, how.top_k, seed)
        # One cast of the weights for all tokens; shards are cast by FSDP.
        with nullcontext() if self.sharded else self.accelerator.autocast():
            completions = self.engine.generate([sample.prompt for sample in given], sampling)
        return [
            [Sample(given[c.group].row, c.prompt, c.tokens, c.finish_reason == "length") for c in part]
            for part in split_on_groups(completions, slices)
        ]

    def loss(self, batch: Batch, normalizer: float) -> tuple[Tensor, DistillStats]:
        """The batch's share of the step's loss, and its statistics a token."""
        config, vocab_size = self.config, self.teacher.vocab_size

        def compute(hidden: Tensor, head: LMHeadParams) -> tuple[Tensor, DistillStats]:
            ids = None
            if config.teacher.targets == "student_topk":
                ids = topk_targets(hidden, head, batch, config, vocab_size).ids
            with self.timed("teacher_seconds"):
                targets = self.teacher.targets(batch, ids)
            loss, stats = distillation_loss(hidden, head, targets, batch, config, vocab_size, normalizer)
            if not loss.isfinite():
                raise NonFiniteLoss(self.diagnosis(batch, targets, stats))
            return loss, stats

        with self.accelerator.autocast():
            return through_student(self.wrapped, self.model, batch, compute)

    def diagnosis(self, batch: Batch, targets: FullTargets | TopKTargets, stats: DistillStats) -> str:
        """Which tokens of a batch have no finite divergence, and whose numbers are at fault."""
        bad = batch.mask & ~(stats.forward_kl.isfinite() & stats.reverse_kl.isfinite())
        broken = (targets.hidden if isinstance(targets, FullTargets) else targets.logprobs).isnan().any(-1)
        found = [f"the loss is not finite at {int(bad.sum())} of {int(batch.mask.sum())} tokens"]
        for row, position in bad.nonzero().tolist()[:5]:
            text = self.tokenizer.decode([batch.tokens[row, position + 1]])
            whose = "are NaN" if broken[row, position] else "are sound"
            found.append(
                f"row {batch.samples[row].row} of the data, token {position + 1} ({text!r}): "
                f"the teacher's numbers {whose}"
            )
        return "; ".join(found)

    def update(self, buffer: list[list[Sample]]) -> dict[str, float]:
        """One optimizer step; the loss is the mean over the tokens of the buffers of all processes."""
        batches = [Batch.of(samples, self.device) for samples in buffer]
        total = max(1.0, float(self.sum(sum(batch.mask.sum() for batch in batches))))
        sums: Any = 0
        for i, batch in enumerate(batches):
            # FSDP would keep whole gradients on every device.
            now = self.sharded or i == len(batches) - 1
            with nullcontext() if now else self.accelerator.no_sync(self.wrapped):
                loss, stats = self.loss(batch, total)
                # DDP and FSDP average over the processes; the tokens of all of them are in `total`.
                self.accelerator.backward(loss * self.processes)
            sums += statistics(batch, loss * total, stats)
        norm: Any = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not isfinite(norm) and self.config.precision != "fp16":  # whose scaler leaves the step out
            raise NonFiniteLoss(f"the loss is finite, its gradient is not: its norm is {norm}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        rate = self.schedule.get_last_lr()[0]
        return averages(self.sum(sums)) | {"grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], list[str]]:
        """The loss on held-out prompts, and a few of the texts that it is of."""
        samples = self.held_out[self.rank :: self.processes]
        if self.config.teacher.stored is None:
            self.send_weights()
            [samples] = self.write(samples, self.config.seed + self.rank, 1)
        sums: Any = 0
        for start in range(0, len(samples), BATCH):
            batch = Batch.of(samples[start : start + BATCH], self.device)
            loss, stats = self.loss(batch, 1.0)
            sums += statistics(batch, loss, stats)
        texts = [self.tokenizer.decode(s.tokens) for s in samples[:SHOWN_SAMPLES]]
        return averages(self.sum(sums)), texts

    def sum(self, values: Any) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(values, "sum")  # pyright: ignore[reportReturnType]

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
            # Tied weights once, which transformers does not see where they were gathered from shards.
            names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in self.model.named_parameters()}
            state = {name: tensor for name, tensor in state.items() if name not in tied}
            self.model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def send_weights(self) -> None:
        """To the server that writes completions, if there is one, unless it has them."""
        if self.server is None or self.sent_at == self.step:
            return
        folder = self.config.output / "weights"
        self.save(folder)
        if self.accelerator.is_main_process:
            self.server.sync_from_disk(folder)
        self.accelerator.wait_for_everyone()
        self.sent_at = self.step


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Distil a student; returns the folder that holds it.

    SIGTERM ends the run after the step under way, with a checkpoint.

    Args:
        config: of the run. Its output folder then holds student, metrics.jsonl, report.html and checkpoints.
        resume: go on from the last checkpoint in the output folder, if there is one.

    Raises:
        ConfigError: a setting that does not fit, by its key.
        NonFiniteLoss: with the tokens at which the loss is not finite.
    """
    found = checkpoints(config.output)
    if found and not resume:
        raise ConfigError(f"output: {config.output} holds checkpoints: --resume goes on from the last")
    run = Trainer(config)
    if found:
        run.step = load_checkpoint(run.accelerator, config, found[-1])
    journal = Journal(run.accelerator, config, run.step)
    with ExitStack() as after:
        before = signal.signal(signal.SIGTERM, lambda *_: run.accelerator.set_trigger())
        after.callback(signal.signal, signal.SIGTERM, before)
        if run.step == 0 and run.held_out:
            journal.write(0, "evaluation", *run.evaluate())
        while run.step < config.steps:
            run.seconds.clear()
            torch.manual_seed(config.seed * 1_000_003 + run.step)  # of nothing but this step
            with run.timed("rollout_seconds"):
                if run.sent_at is None or run.step % config.rollouts.sync_every == 0:
                    run.send_weights()
                buffer = run.fill_buffer()
            with run.timed("update_seconds"):
                metrics = run.update(buffer)
            run.seconds["update_seconds"] -= run.seconds["teacher_seconds"]  # which is inside
            run.step += 1
            spent = sum(run.seconds.values())
            speed = {"tokens_per_second": metrics["tokens"] / spent, "memory_gib": memory_gib(run.device)}
            journal.write(run.step, "train", metrics | speed | dict(run.seconds))
            last = run.step == config.steps
            if run.held_out and (last or run.step % config.evaluate_every == 0):
                journal.write(run.step, "evaluation", *run.evaluate())
            stopping = run.accelerator.check_trigger()  # in any process
            if last or stopping or run.step % config.save_every == 0:
                save_checkpoint(run.accelerator, config, run.step)
                if run.sent_at != run.step:
                    run.sent_at = None  # a run that goes on from here sends its weights first
            if stopping:
                break
        student = config.output / "student"
        run.save(student)
        journal.report()
        run.accelerator.end_training()
    return student


STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


def statistics(batch: Batch, loss: Tensor, stats: DistillStats) -> Tensor:
    """Sums over a batch: its tokens and samples, and what `averages` makes means of."""
    samples, device = batch.samples, loss.device
    lengths = [len(samples), sum(len(s.completion) for s in samples), sum(s.truncated for s in samples)]
    of_samples = torch.tensor(lengths, dtype=wide_dtype(device), device=device)
    of_tokens = [batch.mask.sum(), loss.detach(), *(getattr(stats, name).sum() for name in STATISTICS)]
    return torch.cat([of_samples, torch.stack([value.to(of_samples) for value in of_tokens])])


def averages(sums: Tensor) -> dict[str, float]:
    """A token's, of lengths and truncation a sample's; the count of tokens as it is."""
    samples, length, truncated, tokens, *rest = sums.tolist()
    means = {"completion_length": length / samples, "truncated": truncated / samples, "tokens": tokens}
    names = ("loss", *STATISTICS)
    return means | {name: value / max(tokens, 1) for name, value in zip(names, rest, strict=True)}


def memory_gib(device: torch.device) -> float:
    """The most that this process has held: on the GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
