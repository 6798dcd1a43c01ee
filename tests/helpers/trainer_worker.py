"""Runs the trainer once per config, for accelerate launch: trainer_worker.py ddp|fsdp2 CONFIG..."""

from __future__ import annotations

import os
import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fused_distill.trainer.config import load_config
from fused_distill.trainer.loop import train


def main(strategy: str, *configs: str) -> None:
    PartialState(cpu=True)
    end_training = Accelerator.end_training
    for path in configs:
        if strategy == "fsdp2":  # accelerate offers FSDP2 on accelerators only
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        # Keep the process group until the last run has ended.
        Accelerator.end_training = (
            end_training if path == configs[-1] else lambda self: AcceleratorState._reset_state()
        )
        train(load_config(path), resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # FSDP2's threads on the CPU sometimes abort an interpreter that ends
