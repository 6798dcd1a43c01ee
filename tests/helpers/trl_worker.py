"""Run TRL's trainers one after the other, for accelerate launch: trl_worker.py MODEL FOLDER."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from fused_distill.compat.trl import patch_trl
from transformers import Trainer
from trl_cases import SERVED, Run, lora, make_trainer, train

TEACHERS: dict[str, dict[str, Any]] = {"local": {}, "server": SERVED}
STUDENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": lambda: {"gradient_accumulation_steps": 1},
    "accumulated": dict,  # of two steps
    "adapters": lambda: {"gradient_accumulation_steps": 1, "peft": lora()},
    "accumulated_adapters_and_head": lambda: {"peft": lora(modules_to_save=["lm_head"]), "tied": False},
}
SHARDED = ("accumulated", "accumulated_adapters_and_head")


def runs(model: str, folder: str, students: Iterable[str] = STUDENTS) -> dict[tuple[str, str], Run]:
    """Train each student with each teacher."""
    results = {}
    for teacher, student in product(TEACHERS, students):
        options = {"max_steps": 3, **TEACHERS[teacher], **STUDENTS[student]()}
        results[teacher, student] = train(make_trainer(Path(model), Path(folder), **options))
    return results


def use_fsdp2() -> None:
    """Use FSDP2 from here on, which accelerate supports on accelerators only."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_SYNC_MODULE_STATES="false",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    original = Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self)

    Trainer.create_accelerator_and_postprocess = create


def main(model: str, folder: str) -> None:
    results = {"trl": runs(model, folder)}
    patch_trl()
    results["ddp"] = runs(model, folder)
    use_fsdp2()
    results["fsdp2"] = runs(model, folder, SHARDED)
    torch.save(results, Path(folder) / f"{os.environ['RANK']}.pt")
    Accelerator().end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # FSDP2's threads on the CPU sometimes abort an interpreter that ends
