"""The `fused-distill` command with FSDP2 on the CPU, which accelerate shards on accelerators only."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import DistributedType
from fused_distill.cli import main

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
main()
