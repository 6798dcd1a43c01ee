"""On-policy distillation, read from top to bottom: `train`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..huggingface.lm_head import LMHeadParams
from ..rollouts.grouping import split_on_groups
from .atomic import replace_folder
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data, longest_for_teacher, sample_stream, split_data
from .header import header
from .logger import MetricsLogger
from .long_sequences import check_positions, split_by_tokens
from .metrics import Sums, Timer, memory_gib
from .off_policy import ImportanceRatios
from .preflight import preflight, require
from .rollouts import StudentRollouts
from .saving import save_student, saved_dtype
from .scoring import score
from .self_teacher import following_teachers
from .sources import fingerprints
from .start import check_output, check_packages, check_shares, check_weight_files, make_accelerator
from .stopping import RunStopped, StopSignals
from .student import load_pretrained, load_student, make_optimizer, run_in_student_forward
from .targets import Part, Scored, Teacher, describe_non_finite
from .teachers import check_limits, check_stores, common_vocabulary, evaluating, load_teachers
from .vocabulary import check_tokens

EVAL_BATCH_SIZE = 8
N_SHOWN_SAMPLES = 3


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite; the message names the tokens."""


class Trainer:
    """Models and data of a run, and one optimizer step or evaluation with them."""

    def __init__(self, config: TrainConfig):
        check_packages(config)
        check_weight_files(config)
        self.accelerator, config = make_accelerator(config)
        self.config = config
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.sharded = self.accelerator.device, self.accelerator.is_fsdp2
        check_shares(config, self.processes)
        say = partial(self.accelerator.print, flush=True)
        say(f"loading the tokenizer of {config.student}")
        self.tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, "student", config.student)
        with self.accelerator.local_main_process_first():  # the other processes read the cache of the first
            data = load_data(config, self.tokenizer, completions=config.lmbda < 1)
        say(data)
        self.samples, self.held_out = split_data(data, config)
        say("loading the teacher")
        self.teachers = load_teachers(config, self.tokenizer, self.device, self.sharded)
        completion = config.rollouts.max_completion_length
        check_limits(self.teachers, config, lambda: longest_for_teacher(data.samples, completion))
        check_tokens(self.teachers, data, self.tokenizer, completions=config.lmbda < 1)
        self.sources = fingerprints(data.samples, self.tokenizer, self.teachers)
        check_stores(self.teachers, data, self.sources["data"])
        say(f"loading the student {config.student}")
        torch.manual_seed(config.seed)
        model = load_student(config)
        check_positions(
            "student", model.config, config, lambda: max(map(len, data.samples["prompt"])) + completion
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        self.wrapped, self.optimizer = self.accelerator.prepare(
            model, make_optimizer(trained, config, self.device)
        )
        self.model: PreTrainedModel = self.accelerator.unwrap_model(self.wrapped)
        self.schedule: LRScheduler = get_scheduler(
            config.schedule, self.optimizer, config.warmup_steps, config.steps
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.following = following_teachers(self.teachers, self.model, self.accelerator)
        self.saved_dtype = saved_dtype(config)
        self.rollouts = StudentRollouts(
            config, self.accelerator, self.wrapped, self.tokenizer, common_vocabulary(self.teachers)
        )
        self.importance = ImportanceRatios(config)
        self.timer = Timer(self.device)  # of the current step
        self.step = 0

    def draw(self, step: int) -> tuple[list[list[Sample]], list[Sample], int, int]:
        """Return this process's off-policy slices of a step, and on-policy prompts, their slices and seed."""
        config, slices = self.config, self.config.gradient_accumulation_steps
        stream = sample_stream(self.samples, config.seed, step * config.prompts_per_step)
        local_samples = list(islice(stream, config.prompts_per_step))[self.rank :: self.processes]
        size = len(local_samples) // slices
        # Every process draws the same number of on-policy slices.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        on_policy = int((torch.rand(slices, generator=generator) < config.lmbda).sum())
        off_policy = [local_samples[i * size : (i + 1) * size] for i in range(on_policy, slices)]
        seed = (config.seed << 40) + ((step * self.processes + self.rank) << 16)
        return off_policy, local_samples[: on_policy * size], on_policy, seed

    def fill_buffer(self) -> list[list[Sample]]:
        """Return this process's samples of one step, one list per slice of the gradient accumulation."""
        buffer, prompts, on_policy, seed = self.draw(self.step)
        n = self.config.rollouts.num_generations
        if on_policy:
            buffer = buffer + self.generate(prompts, seed, n, on_policy)
        if self.config.rollouts.ahead:
            _, prompts, on_policy, seed = self.draw(self.step + 1)
            if on_policy:
                sampling = self.rollouts.sampling(n, seed)
                self.rollouts.generate_ahead([sample.prompt for sample in prompts], sampling)
        return buffer

    @torch.no_grad()
    def generate(self, samples: list[Sample], seed: int, n: int, slices: int = 1) -> list[list[Sample]]:
        """Return n completions of each prompt by the student, in slices that split no prompt."""
        prompts = [sample.prompt for sample in samples]
        # Autocast casts the weights once for all tokens; FSDP casts its shards itself.
        with nullcontext() if self.sharded else self.accelerator.autocast():
            completions = self.rollouts.generate(prompts, self.rollouts.sampling(n, seed))
        return [
            [
                samples[c.group]._replace(
                    completion=c.tokens,
                    truncated=c.finish_reason == "length",
                    on_policy=True,
                    logprobs=c.logprobs,
                )
                for c in part
            ]
            for part in split_on_groups(completions, slices)
        ]

    def collate(self, slices: list[list[Sample]]) -> list[Batch]:
        """Return batches for one forward pass each, as many as in every other process."""
        if self.config.tokens_per_forward is not None:
            slices = split_by_tokens(slices, self.config.tokens_per_forward, self.accelerator)
        return [Batch.collate(samples, self.device) for samples in slices]

    def loss(
        self, batch: Batch, normalizer: float, teachers: Mapping[str, Teacher] | None = None
    ) -> tuple[Tensor, list[Scored]]:
        """Return a batch's summed loss divided by `normalizer`, and the part of each of its teachers."""
        asked = self.teachers if teachers is None else teachers

        def compute(states: Tensor, head: LMHeadParams) -> tuple[Tensor, list[Scored]]:
            options = normalizer, self.config, self.importance, self.timer
            scored = [
                score(part, part.select(states), head, asked[part.name], *options)
                for part in Part.split(batch)
            ]
            return sum((part.loss for part in scored[1:]), scored[0].loss), scored

        with self.accelerator.autocast():
            return run_in_student_forward(self.wrapped, self.model, batch, compute)

    def update(self, buffer: list[list[Sample]]) -> dict[str, float]:
        """Do one optimizer step; the loss is the mean over the tokens of the buffers of all processes.

        Raises:
            NonFiniteLoss: the loss or its gradient is not finite; no weight has changed.
        """
        batches = self.collate(buffer)
        n_local = torch.tensor(sum(len(batch.valid) for batch in batches), device=self.device)
        n_tokens = max(1.0, float(self.accelerator.reduce(n_local, "sum")))  # pyright: ignore[reportArgumentType]
        sums = Sums(self.teachers, self.device)
        for i, batch in enumerate(batches):
            # Without reducing gradients per slice FSDP would keep unsharded gradients on every device.
            reduce_now = self.sharded or i == len(batches) - 1
            with nullcontext() if reduce_now else self.accelerator.no_sync(self.wrapped):
                loss, scored = self.loss(batch, n_tokens)
                # DDP and FSDP average over processes, but n_tokens counts the tokens of all of them.
                self.accelerator.backward(loss * self.processes)
            sums.add(scored, n_tokens)
        norm: Any = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        ratios = self.importance.take()
        metrics = self.read_metrics(sums, batches, by_policy=True, ratios=ratios, grad_norm=norm)
        norm = metrics["grad_norm"]
        if not isfinite(norm) and self.config.precision != "fp16":  # the fp16 gradient scaler skips the step
            raise NonFiniteLoss(f"the loss is finite, its gradient is not: its norm is {norm}")
        self.optimizer.step()
        for teacher in self.following:
            teacher.follow(self.step + 1)
        metrics["learning_rate"] = float(self.schedule.get_last_lr()[0])  # before it becomes the next step's
        self.schedule.step()
        self.optimizer.zero_grad()
        return metrics

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Return the mean metrics on held-out prompts and a few decoded samples.

        A teacher in this process gives its whole distribution, whatever the student trains on.
        """
        start = time.perf_counter()
        samples = self.held_out[self.rank :: self.processes]
        if not self.config.uses_store:
            self.rollouts.sync_weights(self.step)
            [samples] = self.generate(samples, self.config.seed + (self.rank << 16), 1)
        starts = range(0, len(samples), EVAL_BATCH_SIZE)
        batches = self.collate([samples[i : i + EVAL_BATCH_SIZE] for i in starts])
        sums = Sums(evaluating(self.teachers), self.device)
        for batch in batches:
            sums.add(self.loss(batch, 1.0, sums.teachers)[1], 1.0)
        decode: Any = self.tokenizer.decode
        shown = [
            {"prompt": decode(s.prompt), "completion": decode(s.completion)}
            for s in samples[:N_SHOWN_SAMPLES]
        ]
        metrics = self.read_metrics(sums, batches, by_policy=False)
        return metrics | {"evaluation_seconds": time.perf_counter() - start}, shown

    def read_metrics(self, sums: Sums, batches: list[Batch], **options: Any) -> dict[str, float]:
        """Read the metrics of all processes at once; raise NonFiniteLoss unless the loss is finite."""
        metrics = sums.read(self.accelerator, **options)
        if not all(isfinite(metrics.get(name, 0.0)) for name in ("loss", "full_loss")):
            raise NonFiniteLoss(self.diagnose(batches, sums.teachers))
        return metrics

    @torch.no_grad()
    def diagnose(self, batches: list[Batch], teachers: Mapping[str, Teacher] | None = None) -> str:
        """Compute the batches once more and describe the first of them whose loss is not finite."""
        # The list holds all of them, as FSDP's processes compute together.
        scored = [part for batch in batches for part in self.loss(batch, 1.0, teachers)[1]]
        diagnoses = [describe_non_finite(part, self.tokenizer) for part in scored]
        return next(filter(None, diagnoses), "the loss is not finite, but every token's is in this process")

    def save(self, folder: Path) -> None:
        """Save the student as the settings name; all processes call it together."""
        merge = self.config.lora is not None and self.config.lora.merge
        scratch = folder.with_name(f"{folder.name}.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
        save_student(
            self.accelerator, self.wrapped, self.tokenizer, scratch, merge=merge, dtype=self.saved_dtype
        )
        if self.accelerator.is_main_process:
            replace_folder(scratch, folder)
        self.accelerator.wait_for_everyone()


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Distil a student and return the folder that holds it.

    SIGTERM and Ctrl-C end the run after the current step, with a checkpoint.

    Args:
        config: settings. The output folder receives student, metrics.jsonl, report.html and checkpoints.
        resume: resume from the last checkpoint in the output folder; start at step 0 if there is none.

    Raises:
        ConfigError: a setting is invalid (the message names its key).
        NonFiniteLoss: the loss is not finite (the message names the tokens).
        RunStopped: SIGTERM or Ctrl-C has ended the run, which is saved and can be resumed.
    """
    check_output(config.output)
    checkpoints = list_checkpoints(config.output)
    if checkpoints and not resume:
        raise ConfigError(f"output: {config.output} holds checkpoints; --resume resumes from the last")
    run = Trainer(config)
    config = run.config
    if checkpoints:
        run.step = load_checkpoint(run.accelerator, config, run.sources)
        if run.step:  # the optimizer's rates are of the run's length at the checkpoint
            run.schedule.last_epoch -= 1
            run.schedule.step()
    if resume:
        done = ", nothing is left to do" if run.step >= config.steps else ""
        start = f"resuming {config.output}" if checkpoints else f"{config.output} has no checkpoint: starting"
        run.accelerator.print(f"{start} at step {run.step} of {config.steps}{done}", flush=True)
    run.accelerator.print(header(run), flush=True)
    require(preflight(run), run.accelerator.is_main_process)
    logger = MetricsLogger(run.accelerator, config, run.step)
    with ExitStack() as cleanup:
        cleanup.callback(run.rollouts.close)
        cleanup.callback(logger.close)
        signals = cleanup.enter_context(StopSignals(run.accelerator))
        if run.step == 0 and run.held_out:
            logger.log(0, "evaluation", *run.evaluate())
        while run.step < config.steps:
            run.timer = Timer(run.device)
            torch.manual_seed(config.seed * 1_000_003 + run.step)  # a resumed run draws the same numbers
            with run.timer.measure("rollout_seconds"):
                if run.rollouts.weights_synced_step is None or run.step % config.rollouts.sync_every == 0:
                    run.rollouts.sync_weights(run.step)
                buffer = run.fill_buffer()
            with run.timer.measure("update_seconds"):
                metrics = run.update(buffer)
            run.step += 1
            seconds = run.timer.read()
            seconds["update_seconds"] -= seconds["teacher_seconds"]  # which it includes
            speed = metrics["tokens"] / sum(seconds.values())
            metrics |= {"tokens_per_second": speed, "memory_gib": memory_gib(run.device)}
            logger.log(run.step, "train", metrics | seconds)
            last = run.step == config.steps
            if run.held_out and (last or run.step % config.evaluate_every == 0):
                logger.log(run.step, "evaluation", *run.evaluate())
            stopping = signals.stopping()
            if last or stopping or run.step % config.save_every == 0:
                if config.rollouts.ahead:
                    run.rollouts.ahead.collect()
                save_checkpoint(run.accelerator, config, run.sources, run.step)
                if run.rollouts.weights_synced_step != run.step:
                    run.rollouts.weights_synced_step = None  # sync, as a run resumed here would
                logger.write_report()
            if stopping:
                break
        student = config.output / "student"
        run.save(student)
        logger.finish()
        run.accelerator.end_training()
    if run.step < config.steps:
        run.accelerator.print(
            f"stopped at step {run.step} of {config.steps}: the run is not finished, --resume continues it",
            flush=True,
        )
        raise RunStopped(signals.status)
    return student
