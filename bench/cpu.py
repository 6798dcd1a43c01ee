"""Time and memory of losses with both gradients on the CPU in float32: ours, peers, and the products alone.

python bench/cpu.py [--output FILE] [--small] [-k EXPRESSION]
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
from providers import FLOOR, Case
from suite import SMALL, Suite, main
from suite import suite as suite

SHAPES = [Case(2048, 32768, 896, 1536), Case(512, 262144, 640, 640)]
TOPK_SHAPES = [Case(2048, 32768, 896, 0, k=64), Case(2048, 131072, 896, 0, k=64)]
PEERS = ["Liger chunked", "TRL", "naive"]
TAILS = ["fused-distill, bucket", "fused-distill, truncate", "fused-distill, renormalize"]
TOPK_PEERS = ["TRL, bucket", "TRL, renormalize"]
ROUNDS = 5
if SMALL in os.environ:
    SHAPES, TOPK_SHAPES, ROUNDS = [Case(64, 500, 32, 48)], [Case(64, 500, 32, 0, k=8)], 2

ROWS = [
    (provider, case)
    for shape in SHAPES
    for provider, case in (
        (FLOOR, shape),
        *(("fused-distill", replace(shape, beta=beta)) for beta in (0.5, 0.0, 1.0)),
        *((peer, shape) for peer in PEERS),
    )
]
for shape in TOPK_SHAPES:
    ROWS.append((FLOOR, shape))
    ROWS += [(name, replace(shape, beta=beta)) for name in (*TAILS, *TOPK_PEERS) for beta in (0.5, 0.0)]
    ROWS.append(("verl, truncate", replace(shape, beta=0.0)))


@pytest.mark.parametrize(("provider", "case"), ROWS, ids=lambda value: getattr(value, "label", str(value)))
def test_cpu(suite: Suite, benchmark: Any, provider: str, case: Case) -> None:
    suite.measure(benchmark, provider, case, ROUNDS)


if __name__ == "__main__":
    sys.exit(main(__file__, "cpu"))
