"""Time and memory of losses with both gradients on the CPU in float32: ours, peers, and the products alone.

    python bench/cpu.py [PART ...] [--only EXPRESSION] [--output FILE] [--small]

full: two sizes measured since the first version. topk: teachers known at 64 tokens. pairs: real models.
Where fused-distill multiplies by oneDNN, the floor and fused-distill are measured by torch.mm too, which is
what peers multiply by.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from models import GEMMA3_DEMO, PAIRS, QWEN3_06B, QWEN25, Pair
from providers import FLOOR, Case
from suite import Planned, chosen_product, main

SHAPES = [Case(2048, 32768, *QWEN25.dims), Case(512, GEMMA3_DEMO.vocab, *GEMMA3_DEMO.dims)]
TOPK_SHAPES = [
    Case(2048, 32768, QWEN25.student.hidden_size, 0, k=64),
    Case(512, QWEN3_06B.vocab_size, QWEN3_06B.hidden_size, 0, k=64),
]
PAIR_TOKENS = 256
SMALL_SHAPES, SMALL_TOPK_SHAPES = [Case(64, 500, 32, 48)], [Case(64, 500, 32, 0, k=8)]
PEERS = ["Liger chunked", "TRL", "naive"]
TAILS = ["fused-distill, bucket", "fused-distill, truncate", "fused-distill, renormalize"]
TOPK_PEERS = ["TRL, bucket", "TRL, renormalize"]


def pair_case(pair: Pair, tokens: int) -> Case:
    return Case(tokens, pair.vocab, *pair.dims)


def with_floors(ours: list[str], case: Case, betas: tuple[float, ...]) -> list[Planned]:
    """Return the floor and our losses, and again by torch.mm at the first beta where ours uses another."""
    product = chosen_product()
    rows = [Planned(FLOOR, case, product)]
    rows += [Planned(name, replace(case, beta=beta), product) for name in ours for beta in betas]
    if product != "torch.mm":
        rows.append(Planned(FLOOR, case))
        rows += [Planned(name, replace(case, beta=betas[0])) for name in ours]
    return rows


def full_group(case: Case, betas: tuple[float, ...]) -> list[Planned]:
    return with_floors(["fused-distill"], case, betas) + [Planned(peer, case) for peer in PEERS]


def full(small: bool) -> list[list[Planned]]:
    return [full_group(case, (0.5, 0.0, 1.0)) for case in (SMALL_SHAPES if small else SHAPES)]


def pairs(small: bool) -> list[list[Planned]]:
    cases = SMALL_SHAPES if small else [pair_case(pair, PAIR_TOKENS) for pair in PAIRS]
    return [full_group(case, (0.5,)) for case in cases]


def topk(small: bool) -> list[list[Planned]]:
    groups: list[list[Planned]] = []
    for case in SMALL_TOPK_SHAPES if small else TOPK_SHAPES:
        peers = [Planned(peer, replace(case, beta=beta)) for peer in TOPK_PEERS for beta in (0.5, 0.0)]
        verl = Planned("verl, truncate", replace(case, beta=0.0))
        groups.append([*with_floors(TAILS, case, (0.5, 0.0)), *peers, verl])
    return groups


if __name__ == "__main__":
    sys.exit(main(__file__, "cpu", {"full": full, "topk": topk, "pairs": pairs}))
