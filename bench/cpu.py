"""Time and memory of a loss with both gradients on the CPU, float32, beside peers and the bare products.

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
PEERS = ["Liger chunked", "TRL", "naive"]
ROUNDS = 5
if SMALL in os.environ:
    SHAPES, ROUNDS = [Case(64, 500, 32, 48)], 2

ROWS = [
    (provider, case)
    for shape in SHAPES
    for provider, case in (
        (FLOOR, shape),
        *(("fused-distill", replace(shape, beta=beta)) for beta in (0.5, 0.0, 1.0)),
        *((peer, shape) for peer in PEERS),
    )
]


@pytest.mark.parametrize(("provider", "case"), ROWS, ids=lambda value: getattr(value, "label", str(value)))
def test_cpu(suite: Suite, benchmark: Any, provider: str, case: Case) -> None:
    suite.measure(benchmark, provider, case, ROUNDS)


if __name__ == "__main__":
    sys.exit(main(__file__, "cpu"))
