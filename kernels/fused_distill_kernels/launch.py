"""Options that the launches of row kernels share."""

from __future__ import annotations

from typing import Any

import torch

THREADS = 256  # of a program
MAX_PARTS = 4  # programs per row, which keep a GPU busy with a chunk of few rows
MAX_REGISTERS = 64  # per thread, so that 4 programs run on a multiprocessor of 65536 registers


def launch_options(device: torch.device) -> dict[str, Any]:
    """Return the options of a program of THREADS threads: warps, registers, and fused multiply-adds."""
    if torch.version.hip is not None:
        warp_size = torch.cuda.get_device_properties(device).warp_size
        return {"num_warps": THREADS // warp_size, "enable_fp_fusion": True}
    return {"num_warps": THREADS // 32, "maxnreg": MAX_REGISTERS, "enable_fp_fusion": True}
