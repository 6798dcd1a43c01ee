"""Seconds of each phase of the trainer's step, next to those of its parts run alone.

    python bench/phases.py [--model PATH] [--output FILE] [--small]

Student and teacher are Gemma 3 270M in float32, all weights are trained, and a step has 8 prompts with
completions of up to 32 tokens. The parts are those that no trainer can leave out: generation, both models'
forward passes, the loss with its gradients, the student's backward pass, and the optimizer. They run on the
batch of the step, in turns with it. The first step and evaluation are a warm-up. JSON goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fused_distill import fused_linear_jsd
from fused_distill.huggingface.lm_head import checked_head, last_hidden_states
from fused_distill.trainer.config import TrainConfig
from fused_distill.trainer.data import Batch, Sample
from fused_distill.trainer.loop import EVAL_BATCH_SIZE, Trainer
from fused_distill.trainer.metrics import Timer
from suite import ROOT, header, results_folder, write_json
from torch import Tensor

MODEL = Path.home() / ".cache" / "fused-distill" / "gemma-3-270m"  # where `make demo` puts it
ROUNDS = 5
STEP = ("rollouts", "teacher", "student")
PHASES = {  # and their parts
    "rollouts": ("generation",),
    "teacher": ("teacher forward",),
    "student": ("student forward and backward", "loss and gradients", "optimizer"),
    "evaluation": ("evaluation: generation", "evaluation: forward passes, loss"),
}


def settings(model: Path, output: Path, small: bool) -> TrainConfig:
    lines = (ROOT / "examples" / "prompts.txt").read_text().splitlines()
    data = output / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return TrainConfig.model_validate(
        {
            "student": str(model),
            "teacher": {"model": str(model), "dtype": "float32"},
            "precision": "fp32",
            "data": {"path": str(data), "evaluation_prompts": 2 if small else 16},
            "rollouts": {"max_completion_length": 4 if small else 32},
            "output": str(output / "run"),
            "steps": 1 + ROUNDS,
            "prompts_per_step": 2 if small else 8,
            "learning_rate": 1e-7,  # so that all steps do the same work
        }
    )


def seconds_of(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Parts:
    """The parts of a trainer's steps and evaluations, each run alone."""

    def __init__(self, run: Trainer):
        self.run, self.student = run, run.model
        self.teacher: Any = run.teachers[""].model  # pyright: ignore[reportAttributeAccessIssue]

    def states(self, model: Any, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention, "use_cache": False}
        return batch.pack(last_hidden_states(model, **inputs))

    def loss(self, hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        own, other = (checked_head(model)[0] for model in (self.student, self.teacher))
        options: dict[str, Any] = own.options("student_") | other.options("teacher_")
        return fused_linear_jsd(
            hidden, own.weight, teacher_hidden, other.weight, return_stats=True, **options
        )[0]

    def generation(self, samples: Sequence[Sample], seed: int) -> tuple[float, list[Sample]]:
        """Return the seconds of one completion per sample, and the samples with them."""
        prompts, sampling = [sample.prompt for sample in samples], self.run.rollouts.sampling(1, seed)
        start = time.perf_counter()
        completions = self.run.rollouts.generate(prompts, sampling)
        seconds = time.perf_counter() - start
        return seconds, [s._replace(completion=c.tokens) for s, c in zip(samples, completions, strict=True)]

    def update(self, batch: Batch) -> dict[str, float]:
        with torch.no_grad():
            teacher = seconds_of(lambda: self.states(self.teacher, batch))
            hidden, teacher_hidden = (self.states(model, batch) for model in (self.student, self.teacher))
        hidden.requires_grad_()
        return {
            "teacher forward": teacher,
            "student forward and backward": seconds_of(
                lambda: self.states(self.student, batch).sum().backward()
            ),
            "loss and gradients": seconds_of(lambda: self.loss(hidden, teacher_hidden).backward()),
            "optimizer": seconds_of(self.optimize),
        }

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()

    @torch.no_grad()
    def evaluation(self) -> dict[str, float]:
        generation, samples = self.generation(self.run.held_out, self.run.config.seed)
        starts = range(0, len(samples), EVAL_BATCH_SIZE)
        batches = [Batch.collate(samples[i : i + EVAL_BATCH_SIZE], self.run.device) for i in starts]

        def score() -> None:
            for batch in batches:
                self.loss(self.states(self.student, batch), self.states(self.teacher, batch))

        return {"evaluation: generation": generation, "evaluation: forward passes, loss": seconds_of(score)}


def measure(run: Trainer) -> dict[str, float]:
    """Return the seconds of the phases of a step and an evaluation, and of their parts run alone."""
    parts = Parts(run)
    _, samples, _, seed = run.draw(run.step)
    generation, _ = parts.generation(samples, seed)
    run.timer = Timer(run.device)
    with run.timer.measure("rollouts"):
        buffer = run.fill_buffer()
    with run.timer.measure("student"):
        run.update(buffer)
    seconds = run.timer.read()
    seconds["teacher"] = seconds.pop("teacher_seconds")
    seconds["student"] -= seconds["teacher"]
    [batch] = run.collate(buffer)
    seconds |= {"generation": generation, **parts.update(batch)}
    run.step += 1
    seconds["evaluation"] = run.evaluate()[0]["evaluation_seconds"]
    return seconds | parts.evaluation()


def rows(rounds: Sequence[dict[str, float]], title: str) -> Iterator[dict[str, Any]]:
    """Return three cells for each phase from the seconds of several rounds: in a run, share, and alone."""
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    step = sum(medians[name] for name in STEP)
    whole = [part for name in STEP for part in PHASES[name]]
    of_step = [(name, medians[name], PHASES[name]) for name in STEP]
    evaluation = ("evaluation", medians["evaluation"], PHASES["evaluation"])
    for case, spent, parts in (*of_step, ("whole step", step, whole), evaluation):
        alone = {part.removeprefix("evaluation: "): medians[part] for part in parts}
        shown = f"{sum(alone.values()):.2f} s"
        if len(parts) > 1 and case in PHASES:
            shown += f" ({', '.join(f'{part} {seconds:.2f}' for part, seconds in alone.items())})"
        share = f"{spent / step:.0%}" if case != "evaluation" else "-"
        for provider, text in (
            ("in a run", f"{spent:.2f} s"),
            ("share of the step", share),
            ("sum of the parts run alone", shown),
        ):
            yield {"table": title, "case": case, "provider": provider, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="student and teacher, a local path")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    arguments = parser.parse_args()
    output = arguments.output or results_folder(arguments.small) / "phases.json"
    with TemporaryDirectory() as scratch:
        run = Trainer(settings(arguments.model, Path(scratch), arguments.small))
        measure(run)  # compiles
        seconds = [measure(run) for _ in range(ROUNDS)]
    config = run.config
    title = (
        f"{config.prompts_per_step} prompts a step, {config.data.evaluation_prompts} in an evaluation, "
        f"completions of up to {config.rollouts.max_completion_length} tokens, medians of {ROUNDS} rounds"
    )
    write_json(output, {**header(), "seconds": seconds, "rows": [*rows(seconds, title)]})
    print(output)


if __name__ == "__main__":
    main()
