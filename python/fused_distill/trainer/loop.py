"""On-policy distillation, read from top to bottom: `train`."""

from __future__ import annotations

import signal
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..huggingface.lm_head import LMHeadParams
from ..rollouts.base import Sampling
from ..rollouts.grouping import split_on_groups
from ..stats import DistillStats
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import ConfigError, TrainConfig
from .data import Batch, Sample, load_data, sample_stream, split_data
from .long_sequences import check_positions, split_by_tokens
from .metrics import MetricsLogger, Timer, batch_sums, mean_metrics, memory_gib, sample_counts
from .rollouts import StudentRollouts
from .sources import fingerprints
from .stored import StoredTeacher
from .student import load_pretrained, load_student, run_in_student_forward
from .targets import Targets, describe_non_finite, distillation_loss, topk_targets
from .teachers import check_limits, load_teacher

EVAL_BATCH_SIZE = 8
N_SHOWN_SAMPLES = 3


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite; the message names the tokens."""


class Trainer:
    """Models and data of a run, and one optimizer step or evaluation with them."""

    def __init__(self, config: TrainConfig):
        check_packages(config)
        self.accelerator, config = make_accelerator(config)
        self.config = config
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.sharded = self.accelerator.device, self.accelerator.is_fsdp2
        check_shares(config, self.processes)
        self.tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, "student", config.student)
        with self.accelerator.local_main_process_first():  # the other processes read the cache of the first
            data = load_data(config, self.tokenizer, completions=config.lmbda < 1)
        self.accelerator.print(data)
        self.samples, self.held_out = split_data(data, config)
        self.teacher = load_teacher(config, self.tokenizer, self.device)
        completion = config.rollouts.max_completion_length

        def longest() -> int:
            return max(map(len, data.samples["prompt"]), default=0) + completion

        check_limits(self.teacher, config, longest)
        self.sources = fingerprints(data.samples, self.tokenizer, self.teacher)
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.check(data, self.sources["data"])
        torch.manual_seed(config.seed)
        model = load_student(config)
        check_positions("student", model.config, config, longest)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: PreTrainedModel = self.accelerator.unwrap_model(self.wrapped)
        self.schedule: LRScheduler = get_scheduler(
            config.schedule, self.optimizer, config.warmup_steps, config.steps
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.rollouts = StudentRollouts(config, self.accelerator, self.wrapped, self.save)
        self.timer = Timer(self.device)  # of the current step
        self.step = 0

    def fill_buffer(self) -> list[list[Sample]]:
        """Return this process's samples of one step, one list per slice of the gradient accumulation."""
        config, slices = self.config, self.config.gradient_accumulation_steps
        stream = sample_stream(self.samples, config.seed, self.step * config.prompts_per_step)
        local_samples = list(islice(stream, config.prompts_per_step))[self.rank :: self.processes]
        size = len(local_samples) // slices
        # Every process draws the same number of on-policy slices.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        on_policy = int((torch.rand(slices, generator=generator) < config.lmbda).sum())
        buffer = [local_samples[i * size : (i + 1) * size] for i in range(on_policy, slices)]
        if on_policy:
            seed = (config.seed << 40) + ((self.step * self.processes + self.rank) << 16)
            n = config.rollouts.num_generations
            buffer += self.generate(local_samples[: on_policy * size], seed, n, on_policy)
        return buffer

    @torch.no_grad()
    def generate(self, samples: list[Sample], seed: int, n: int, slices: int = 1) -> list[list[Sample]]:
        """Return n completions of each prompt by the student, in slices that split no prompt."""
        settings = self.config.rollouts
        sampling = Sampling(
            n, settings.max_completion_length, settings.temperature, settings.top_p, settings.top_k, seed
        )
        # Autocast casts the weights once for all tokens; FSDP casts its shards itself.
        with nullcontext() if self.sharded else self.accelerator.autocast():
            completions = self.rollouts.generate([sample.prompt for sample in samples], sampling)
        return [
            [Sample(samples[c.group].row, c.prompt, c.tokens, c.finish_reason == "length") for c in part]
            for part in split_on_groups(completions, slices)
        ]

    def collate(self, slices: list[list[Sample]]) -> list[Batch]:
        """Return batches for one forward pass each, as many as in every other process."""
        if self.config.tokens_per_forward is not None:
            slices = split_by_tokens(slices, self.config.tokens_per_forward, self.accelerator)
        return [Batch.collate(samples, self.device) for samples in slices]

    def loss(self, batch: Batch, normalizer: float) -> tuple[Tensor, DistillStats, Targets]:
        """Return a batch's summed loss divided by `normalizer`, its per-token statistics and its targets."""
        config, vocab_size = self.config, self.teacher.vocab_size

        def compute(hidden: Tensor, head: LMHeadParams) -> tuple[Tensor, DistillStats, Targets]:
            ids = None
            if config.teacher.targets == "student_topk":
                ids = topk_targets(hidden, head, config, vocab_size).ids
            with self.timer.measure("teacher_seconds"):
                targets = self.teacher.targets(batch, ids)
            loss = distillation_loss(hidden, head, targets, normalizer, config, vocab_size)
            return *loss, targets

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
        sums: list[Tensor] = []
        for i, batch in enumerate(batches):
            # Without reducing gradients per slice FSDP would keep unsharded gradients on every device.
            reduce_now = self.sharded or i == len(batches) - 1
            with nullcontext() if reduce_now else self.accelerator.no_sync(self.wrapped):
                loss, stats = self.loss(batch, n_tokens)[:2]
                # DDP and FSDP average over processes, but n_tokens counts the tokens of all of them.
                self.accelerator.backward(loss * self.processes)
            sums.append(batch_sums(loss * n_tokens, stats))
        norm: Any = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        metrics = self.read_metrics(sums, batches, grad_norm=norm)
        norm = metrics["grad_norm"]
        if not isfinite(norm) and self.config.precision != "fp16":  # the fp16 gradient scaler skips the step
            raise NonFiniteLoss(f"the loss is finite, its gradient is not: its norm is {norm}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return metrics | {"learning_rate": float(self.schedule.get_last_lr()[0])}

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], list[str]]:
        """Return the mean metrics on held-out prompts and a few decoded samples."""
        samples = self.held_out[self.rank :: self.processes]
        if self.config.teacher.stored is None:
            self.rollouts.sync_weights(self.step)
            [samples] = self.generate(samples, self.config.seed + self.rank, 1)
        starts = range(0, len(samples), EVAL_BATCH_SIZE)
        batches = self.collate([samples[i : i + EVAL_BATCH_SIZE] for i in starts])
        sums = [batch_sums(*self.loss(batch, 1.0)[:2]) for batch in batches]
        shown = [str(self.tokenizer.decode(s.tokens)) for s in samples[:N_SHOWN_SAMPLES]]
        return self.read_metrics(sums, batches), shown

    def read_metrics(self, sums: list[Tensor], batches: list[Batch], **others: Tensor) -> dict[str, float]:
        """Read metrics of all processes and others at once; raise NonFiniteLoss unless the loss is finite."""
        counts = sums[0].new_tensor(sample_counts(batches))
        totals: Any = self.accelerator.reduce(torch.cat([counts, sum(sums[1:], sums[0])]), "sum")
        numbers = torch.cat([totals, *(value.to(totals).reshape(1) for value in others.values())]).tolist()
        n = len(totals)
        metrics = mean_metrics(numbers[:n]) | dict(zip(others, numbers[n:], strict=True))
        if not isfinite(metrics["loss"]):
            raise NonFiniteLoss(self.diagnose(batches))
        return metrics

    @torch.no_grad()
    def diagnose(self, batches: list[Batch]) -> str:
        """Compute the batches once more and describe the first of them whose loss is not finite."""
        # The list holds all of them, as FSDP's processes compute together.
        diagnoses = [describe_non_finite(b, *self.loss(b, 1.0)[1:], self.tokenizer) for b in batches]
        return next(filter(None, diagnoses), "the loss is not finite, but every token's is in this process")

    def save(self, folder: Path) -> None:
        """Save the student in the format of transformers and vLLM; all processes call it together."""
        state = self.accelerator.get_state_dict(self.wrapped)
        if self.accelerator.is_main_process:
            # Drop copies of tied weights: transformers does not recognise them when gathered from shards.
            names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in self.model.named_parameters()}
            state = {name: tensor for name, tensor in state.items() if name not in tied}
            self.model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Distil a student and return the folder that holds it.

    SIGTERM ends the run after the current step, with a checkpoint.

    Args:
        config: settings. The output folder receives student, metrics.jsonl, report.html and checkpoints.
        resume: resume from the last checkpoint in the output folder, if there is one.

    Raises:
        ConfigError: a setting is invalid (the message names its key).
        NonFiniteLoss: the loss is not finite (the message names the tokens).
    """
    checkpoints = list_checkpoints(config.output)
    if checkpoints and not resume:
        raise ConfigError(f"output: {config.output} holds checkpoints; --resume resumes from the last")
    run = Trainer(config)
    config = run.config
    if checkpoints:
        run.step = load_checkpoint(run.accelerator, config, run.sources)
    logger = MetricsLogger(run.accelerator, config, run.step)
    with ExitStack() as cleanup:
        cleanup.callback(run.rollouts.close)
        previous_handler = signal.signal(signal.SIGTERM, lambda *_: run.accelerator.set_trigger())
        cleanup.callback(signal.signal, signal.SIGTERM, previous_handler)
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
            stopping = run.accelerator.check_trigger()  # SIGTERM in any process
            if last or stopping or run.step % config.save_every == 0:
                save_checkpoint(run.accelerator, config, run.sources, run.step)
                if run.rollouts.weights_synced_step != run.step:
                    run.rollouts.weights_synced_step = None  # sync, as a run resumed here would
            if stopping:
                break
        student = config.output / "student"
        run.save(student)
        logger.write_report()
        run.accelerator.end_training()
    return student


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """Return accelerate's Accelerator for a run, and the settings with a precision for its device."""
    cpu = not torch.accelerator.is_available()  # else processes on a CPU would not form a group
    # Longer than a client retries its server while the other processes wait.
    timeout = timedelta(hours=2, seconds=config.teacher.deadline_seconds)
    device: Any = PartialState(cpu, timeout=timeout).device
    config = choose_precision(config, device)
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=cpu,
        log_with=[*config.trackers] or None,
        project_dir=str(config.output),
    )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version: must be 2 (of accelerate's settings)")
    return accelerator, config


def choose_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the settings with precision auto replaced by bf16 or fp32."""
    if config.precision != "auto":
        return config
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.model_copy(update={"precision": "bf16" if bf16 else "fp32"})


def check_packages(config: TrainConfig) -> None:
    """Raise a ConfigError if a package that the settings need is not installed."""
    rollouts = config.rollouts
    for needed, setting, package in (
        (config.lora is not None, "lora", "peft"),
        (rollouts.engine == "vllm", "rollouts.engine: vllm", "vllm"),
        (rollouts.sync == "nccl", "rollouts.sync: nccl", "vllm"),
        (config.attention == "flash_attention_2", "attention: flash_attention_2", "flash_attn"),
        *((True, f"trackers: {name}", name) for name in config.trackers),
    ):
        if needed and find_spec(package) is None:
            raise ConfigError(f"{setting} needs {package} beside the trainer: pip install {package}")


def check_shares(config: TrainConfig, processes: int) -> None:
    """Raise a ConfigError unless processes and slices get equal shares of the prompts."""
    slices, prompts = processes * config.gradient_accumulation_steps, config.data.evaluation_prompts
    if config.prompts_per_step % slices:
        shares = f"{slices} (gradient_accumulation_steps times processes)"
        raise ConfigError(f"prompts_per_step: {config.prompts_per_step} must be a multiple of {shares}")
    if prompts % processes:
        raise ConfigError(f"data.evaluation_prompts: {prompts} must be a multiple of {processes} processes")
