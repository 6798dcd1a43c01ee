"""Seconds per step and peak memory of TRL's DistillationTrainer with its own loss and with ours.

    python bench/trl_trainer.py [--output FILE] [--small]

Two random Llamas of two layers and a vocabulary of 65536 on the CPU, beta 0.5, float32, 16 prompts per step
with completions of 64 tokens, so that the loss takes most of the step. Each run has its own process, and its
first step is a warm-up. Both runs start from the same weights and must log the same losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from suite import header, results_folder, write_json

STEPS = 4
TITLE = "TRL's DistillationTrainer, {} tokens per step, V {}"


def run(patched: bool, small: bool) -> dict[str, Any]:
    """Return losses, seconds of every step but the first, and peak memory beyond the models."""
    import datasets
    import torch
    import transformers
    from fused_distill.compat.trl import patch_trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer
    from worker import status_bytes

    vocab, prompts, tokens = (300, 2, 4) if small else (65536, 16, 64)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": vocab,
    }
    student, teacher = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=size, intermediate_size=2 * size, pad_token_id=0, eos_token_id=1, **sizes
            )
        )
        for size in (256, 384)
    )
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder,
            beta=0.5,
            max_steps=STEPS,
            per_device_train_batch_size=prompts,
            max_completion_length=tokens,
            learning_rate=1e-4,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        with patch_trl() if patched else nullcontext():
            trainer = DistillationTrainer(
                model=student,
                teacher_model=teacher.eval(),
                args=settings,
                train_dataset=datasets.Dataset.from_dict({"prompt": ["w5 w6 w7"] * prompts * STEPS}),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
            before = status_bytes("VmRSS")
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [b - a for a, b in pairwise(times)]
    peak = status_bytes("VmHWM") - before
    return {"losses": losses, "seconds": seconds, "bytes": peak, "tokens": prompts * tokens, "vocab": vocab}


def rows(small: bool) -> Iterator[dict[str, Any]]:
    for provider, loss in (("TRL's own loss", "own"), ("patch_trl()", "patched")):
        command = [sys.executable, __file__, "--run", loss, *(["--small"] if small else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        title = TITLE.format(result["tokens"], result["vocab"])
        for case, text in (
            ("seconds per step, generation included", f"{statistics.median(result['seconds']):.2f}"),
            ("peak memory beyond the models, GiB", f"{result['bytes'] / 2**30:.2f}"),
            (f"loss at step {STEPS}", f"{result['losses'][-1]:.6f}"),
        ):
            yield {"table": title, "case": case, "provider": provider, "text": text, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    parser.add_argument("--run", choices=("own", "patched"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run == "patched", arguments.small)))
        return
    output = arguments.output or results_folder(arguments.small) / "trl-trainer.json"
    write_json(output, {**header(), "rows": [*rows(arguments.small)]})
    print(output)


if __name__ == "__main__":
    main()
