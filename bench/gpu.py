"""Time and memory of losses with both gradients on a GPU in bfloat16: ours, peers, and the products alone.

    python bench/gpu.py [--output FILE] [--small] [-k EXPRESSION]

The floor and fused-distill run first, so that an interrupted run still holds the main comparison.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from providers import FLOOR, Case
from suite import SMALL, Suite, main
from suite import suite as suite

DIMENSIONS, TOKENS, VOCAB = [(1024, 4096), (2048, 4096), (4096, 4096)], [1024, 8192, 32768], 151936
TOPK_DIMENSIONS, TOPK_TOKENS, SUPPORTS = [2048, 4096], 8192, [1, 16, 64, 256]
DEVICE = "cuda"
if SMALL in os.environ:
    DIMENSIONS, TOKENS, VOCAB = [(16, 32)], [8, 24], 300
    TOPK_DIMENSIONS, TOPK_TOKENS, SUPPORTS = [16], 8, [1, 4]
    if not torch.cuda.is_available():
        DEVICE = "cpu"
        os.environ["TRITON_INTERPRET"] = "1"

SHAPES = [
    Case(tokens, VOCAB, student_dim, teacher_dim, dtype="bfloat16", device=DEVICE)
    for student_dim, teacher_dim in DIMENSIONS
    for tokens in TOKENS
]
TOPK_SHAPES = [
    Case(TOPK_TOKENS, VOCAB, student_dim, 0, dtype="bfloat16", device=DEVICE, k=k)
    for student_dim in TOPK_DIMENSIONS
    for k in SUPPORTS
]


def rows(
    providers: list[str], betas: tuple[float, ...], cases: list[Case] = SHAPES
) -> list[tuple[str, Case]]:
    return [
        (provider, replace(case, beta=beta)) for provider in providers for beta in betas for case in cases
    ]


ROWS = [
    *rows([FLOOR], (0.5,)),
    *rows(["fused-distill, triton"], (0.5, 0.0, 1.0)),
    *rows([FLOOR], (0.5,), TOPK_SHAPES),
    *rows(["fused-distill, bucket", "fused-distill, renormalize"], (0.5, 0.0), TOPK_SHAPES),
    *rows(["fused-distill, truncate"], (0.5,), TOPK_SHAPES),
    *rows(["Liger chunked", "Liger Triton", "TRL", "naive"], (0.5, 0.0, 1.0)),
    *rows(["fused-distill, torch"], (0.5,)),
    *rows(["TRL, bucket", "TRL, renormalize"], (0.5,), TOPK_SHAPES),
    *rows(["verl, truncate"], (0.0,), TOPK_SHAPES),
]


@pytest.mark.parametrize(("provider", "case"), ROWS, ids=lambda value: getattr(value, "label", str(value)))
def test_gpu(suite: Suite, benchmark: Any, provider: str, case: Case) -> None:
    suite.measure(benchmark, provider, case, rounds=3 if case.tokens > 8192 else 5)


if __name__ == "__main__":
    sys.exit(main(__file__, "cuda"))
