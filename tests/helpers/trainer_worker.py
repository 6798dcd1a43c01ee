"""Runs of the trainer one after the other, for accelerate launch: trainer_worker.py ddp|fsdp2 SETTINGS..."""

from __future__ import annotations

import os
import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fused_distill.trainer.config import load_config
from fused_distill.trainer.loop import train


def main(how: str, *settings: str) -> None:
    PartialState(cpu=True)
    part = Accelerator.end_training
    for path in settings:
        if how == "fsdp2":  # which accelerate has for accelerators only
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        Accelerator.end_training = (
            part if path == settings[-1] else lambda self: AcceleratorState._reset_state()
        )
        train(load_config(path), resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # FSDP2's threads on the CPU now and then abort an interpreter that ends
