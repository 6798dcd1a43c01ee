"""Time and memory of losses with both gradients on a GPU in bfloat16: ours, peers, and the products alone.

    python bench/gpu.py [PART ...] [--only EXPRESSION] [--output FILE] [--small]

full: a full-vocabulary teacher, on real pairs of models. topk: teachers known at K tokens. The floor and
fused-distill run first, so that an interrupted run still holds the main comparison. A provider's rows of one
shape take turns; those of different providers do not, because their memory would not fit side by side.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
from models import GEMMA3, LLAMA3, QWEN3, QWEN3_LARGE, QWEN3_MEDIUM
from providers import FLOOR, Case
from suite import Planned, main

TOKENS, OTHER_TOKENS, SUPPORTS = 8192, (1024, 32768), (1, 16, 64, 256)
Group = list[Planned]


def shapes(small: bool) -> list[Case]:
    if small:
        return [on_gpu(Case(tokens, 300, 16, 32), small) for tokens in (8, 24)]
    cases = [(pair, TOKENS) for pair in (QWEN3, QWEN3_MEDIUM, QWEN3_LARGE, LLAMA3, GEMMA3)]
    cases += [(QWEN3, tokens) for tokens in OTHER_TOKENS]
    return [on_gpu(Case(tokens, pair.vocab, *pair.dims), small) for pair, tokens in cases]


def topk_shapes(small: bool) -> list[Case]:
    if small:
        return [on_gpu(Case(8, 300, 16, 0, k=k), small) for k in (1, 4)]
    students = (QWEN3_MEDIUM.student, QWEN3_LARGE.student)
    cases = [
        Case(TOKENS, model.vocab_size, model.hidden_size, 0, k=k) for model in students for k in SUPPORTS
    ]
    return [on_gpu(case, small) for case in cases]


def on_gpu(case: Case, small: bool) -> Case:
    """Return the case on the GPU in bfloat16, or for --small without a GPU, in Triton's interpreter."""
    without = small and not torch.cuda.is_available()
    if without:
        os.environ["TRITON_INTERPRET"] = "1"
    return replace(case, dtype="bfloat16", device="cpu" if without else "cuda")


def groups(providers: list[str], betas: tuple[float, ...], cases: list[Case]) -> list[Group]:
    return [
        [Planned(provider, replace(case, beta=beta)) for beta in betas]
        for provider in providers
        for case in cases
    ]


def full(small: bool) -> list[Group]:
    cases, betas = shapes(small), (0.5, 0.0, 1.0)
    return [
        *groups([FLOOR], (0.5,), cases),
        *groups(["fused-distill, triton", "Liger chunked", "Liger Triton", "TRL", "naive"], betas, cases),
        *groups(["fused-distill, torch"], (0.5,), cases),
    ]


def topk(small: bool) -> list[Group]:
    cases = topk_shapes(small)
    return [
        *groups([FLOOR], (0.5,), cases),
        *groups(["fused-distill, bucket", "fused-distill, renormalize"], (0.5, 0.0), cases),
        *groups(["fused-distill, truncate", "TRL, bucket", "TRL, renormalize"], (0.5,), cases),
        *groups(["verl, truncate"], (0.0,), cases),
    ]


if __name__ == "__main__":
    sys.exit(main(__file__, "cuda", {"full": full, "topk": topk}))
