"""Runs of the trainer one after the other, for torchrun: trainer_worker.py ddp|fsdp2 SETTINGS..."""

from __future__ import annotations

import os
import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fused_distill.trainer.config import load_config
from fused_distill.trainer.loop import train

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main(how: str, *settings: str) -> None:
    PartialState(cpu=True)
    part = Accelerator.end_training
    for path in settings:
        if how == "fsdp2":  # which accelerate has for accelerators only
            os.environ.update(FSDP2)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        Accelerator.end_training = (
            part if path == settings[-1] else lambda self: AcceleratorState._reset_state()
        )
        train(load_config(path), resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
