"""Count instructions, bytes and resources of every Triton kernel, compiled as it is launched. Needs no GPU.

    python bench/kernel_costs.py [--output FILE] [--json] [--target sm_90 ...] [-k TEXT]

The calls below are recorded (bench/launches.py) and each distinct variant of a kernel is compiled and counted
(bench/machine_code.py), ours and those of TRL's and Liger's fused losses. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default that Triton 3.10 changes

import torch
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from launches import Launch, half_products_on_the_cpu, recorded_launches
from machine_code import LIMITS, SPECIAL, TARGETS, Program, blocks_per_multiprocessor, disassemble, ttir_tiles
from torch import Tensor

OURS, TOKENS, DIMENSION, SUPPORT = "fused-distill", 8, 16, 64
BETAS = (0.0, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Call:
    """One call of a loss, whose kernels are counted."""

    provider: str
    name: str
    run: Callable[[int], Any]  # takes the vocabulary size
    max_columns: int = sys.maxsize  # columns of a row that a kernel sees at most


def hidden(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bfloat16 hidden states and LM heads of a student and a teacher."""
    shapes = [(TOKENS, DIMENSION), (vocab, DIMENSION)] * 2
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3]


def full(**options: Any) -> Callable[[int], Any]:
    def run(vocab: int) -> None:
        result = fused_linear_jsd(*hidden(vocab), **options)
        (result[0] if options.get("return_stats") else result).backward()

    return run


def full_with_every_option(**options: Any) -> Callable[[int], Any]:
    def run(vocab: int) -> None:
        student_bias, teacher_bias = torch.zeros(2, vocab, dtype=torch.bfloat16)
        full(
            student_bias=student_bias.requires_grad_(),
            teacher_bias=teacher_bias,
            temperature=0.7,
            labels=torch.zeros(TOKENS, dtype=torch.int64),
            token_weight=torch.ones(TOKENS),
            hard_weight=0.5,
            return_stats=True,
            **{"student_softcap": 30.0, "teacher_softcap": 30.0, **options},
        )(vocab)

    return run


def without_gradients(vocab: int) -> None:
    with torch.no_grad():
        fused_linear_jsd(*hidden(vocab))


def topk(every_option: bool = False, support: int = SUPPORT, **options: Any) -> Callable[[int], Any]:
    def run(vocab: int) -> None:
        student_hidden, student_weight, *_ = hidden(vocab)
        ids = torch.arange(support).expand(TOKENS, support).contiguous()
        logprobs = torch.full((TOKENS, support), -5.0)
        more: dict[str, Any] = {}
        if every_option:
            more = {
                "student_bias": torch.zeros(vocab, dtype=torch.bfloat16).requires_grad_(),
                "student_softcap": 30.0,
                "temperature": 0.7,
                "labels": torch.zeros(TOKENS, dtype=torch.int64),
                "hard_weight": 0.5,
            }
        fused_linear_topk_jsd(student_hidden, student_weight, logprobs, ids, **more, **options).backward()

    return run


def teacher_logprobs(vocab: int) -> None:
    topk_logprobs(*hidden(vocab)[2:], SUPPORT)


def trl(beta: float) -> Callable[[int], Any]:
    def run(vocab: int) -> None:
        from unittest.mock import patch

        from trl.kernels import chunked_divergence

        with patch.object(chunked_divergence, "_use_triton", lambda device: True):
            hs, ws, ht, wt = hidden(vocab)
            result: Any = chunked_divergence.ChunkedDivergenceFunction.apply(hs, ws, None, ht, wt, None, beta)
            result[0].mean().backward()

    return run


def liger(beta: float) -> Callable[[int], Any]:
    def run(vocab: int) -> None:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        LigerFusedLinearJSD(jsd_beta=beta)(*hidden(vocab), None).backward()

    return run


# Divergences beside "jsd", and ones whose clipped terms take different code, by their names in the tables.
DIVERGENCES: dict[str, dict[str, Any]] = {
    "skewed KL": {"divergence": "skew_reverse_kl"},
    "mixed KL": {"divergence": "mixed_kl"},
    "total variation": {"divergence": "total_variation"},
}
CLIPPED: dict[str, dict[str, Any]] = {
    "beta 0.3, clipped": {"beta": 0.3, "entry_clip": 0.1},
    "mixed KL, clipped": {"divergence": "mixed_kl", "entry_clip": 0.1},
}

CALLS = [
    *(Call(OURS, f"beta {beta:g}", full(beta=beta)) for beta in BETAS),
    *(Call(OURS, f"beta {beta:g}, statistics", full(beta=beta, return_stats=True)) for beta in BETAS),
    *(
        Call(
            OURS,
            f"beta {beta:g}, statistics, softcap",
            full(beta=beta, return_stats=True, student_softcap=30.0, teacher_softcap=30.0),
        )
        for beta in BETAS
    ),
    *(Call(OURS, f"beta {beta:g}, every option", full_with_every_option(beta=beta)) for beta in BETAS),
    *(Call(OURS, name, full(**options)) for name, options in DIVERGENCES.items()),
    *(
        Call(OURS, f"{name}, statistics", full(return_stats=True, **options))
        for name, options in DIVERGENCES.items()
    ),
    *(
        Call(OURS, f"{name}, every option", full_with_every_option(**options))
        for name, options in CLIPPED.items()
    ),
    Call(OURS, "beta 0.5, no gradients", without_gradients),
    *(Call(OURS, f"top-k, {tail}", topk(tail=tail)) for tail in ("bucket", "renormalize", "truncate")),
    Call(OURS, "top-k, bucket, every option", topk(every_option=True, tail="bucket")),
    Call(OURS, "topk_logprobs", teacher_logprobs),
    *(Call("TRL", f"beta {beta:g}", trl(beta), max_columns=32768) for beta in (0.0, 0.5, 1.0)),
    *(Call("Liger Triton", f"beta {beta:g}", liger(beta)) for beta in (0.0, 0.5, 1.0)),
]

# Logits of the two models that are not transformed alike: compiled by tests, not counted.
UNLIKE_TRANSFORMS = [
    Call(OURS, str(options), full_with_every_option(**options))
    for options in (
        {"student_softcap": None},
        {"teacher_softcap": None},
        {"student_softcap": 20.0},
        {"teacher_logit_scale": 0.5},
        {"student_softcap": None, "teacher_softcap": None, "student_logit_scale": 2.0},
    )
]


def record(call: Call, vocab: int) -> list[Launch]:
    """Return the kernels that a call launches, in order; none if it launches no Triton kernel."""
    with half_products_on_the_cpu(), recorded_launches() as launches:
        call.run(vocab)
    return launches


class Shape(NamedTuple):
    """Logits that a launch reads or writes."""

    names: set[str]  # the arguments that hold them
    rows: int
    columns: int


def logits_of(launch: Launch, vocab: int, call: Call) -> Shape | None:
    """Return the logits among a launch's arguments: matrices as wide as the vocabulary or the call's tile."""
    narrowest = vocab % call.max_columns or min(vocab, call.max_columns)
    matrices = {
        name: value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] >= narrowest
    }
    return Shape(set(matrices), *next(iter(matrices.values())).shape) if matrices else None


@dataclass
class Cost:
    """What one variant of a kernel costs on one target.

    A position is a column of a row: a pair of logits, or one logit with a top-k teacher.
    """

    target: str
    provider: str
    kernel: str
    calls: dict[str, float] = field(default_factory=dict)  # passes over all logits, by call
    num_warps: int = 0
    registers: int = 0
    spilled: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    loops: int = 0  # hot loops; 0: straight-line code
    instructions: float | None = None  # per position; None: the kernel passes over no logits
    special: float | None = None  # of which exp2, log2, 1/x and the like
    instructions_outside: int = 0  # per thread, at most, not in a hot loop
    instructions_with_outside: float | None = None  # per position, in rows as wide as the vocabulary
    bytes: float | None = None  # loaded and stored per position
    load_bytes: dict[str, int] = field(default_factory=dict)  # accesses by width, in the code that is counted
    store_bytes: dict[str, int] = field(default_factory=dict)
    barriers: int = 0  # in the code that is counted


def hot_code(
    program: Program, ttir: str, logits: Shape | None, threads: int
) -> list[tuple[set[int], float, float]]:
    """Return the code that passes over logits: its instructions, positions per thread, bytes per position."""
    tiles = ttir_tiles(ttir, logits.names if logits else set())
    in_loops = [tile for tile in tiles if tile.in_loop]
    if not in_loops:
        return [(program.reachable, t.positions / threads, t.loaded + t.stored) for t in tiles[:1]]
    loops = program.tile_loops()
    if len(loops) < len(in_loops):
        raise ValueError(f"found {len(loops)} loops over tiles in machine code, expected {len(in_loops)}")
    largest = sorted(loops, key=program.loaded_bytes, reverse=True)[: len(in_loops)]
    pairs = list(zip([loop for loop in loops if loop in largest], in_loops, strict=True))
    unmasked = [(loop, tile) for loop, tile in pairs if not tile.masked]
    return [
        (loop, program.loaded_bytes(loop) / tile.loaded, tile.loaded + tile.stored)
        for loop, tile in unmasked or pairs
    ]


def cost_of(launch: Launch, compiled: Any, target: str, logits: Shape | None, provider: str) -> Cost:
    """Count one compiled kernel."""
    program, usage = disassemble(compiled, TARGETS[target])
    num_warps = compiled.metadata.num_warps
    threads = num_warps * TARGETS[target].warp_size
    cost = Cost(
        target=target,
        provider=provider,
        kernel=launch.kernel.fn.__name__,
        num_warps=num_warps,
        registers=usage.registers,
        spilled=usage.spilled,
        shared_bytes=usage.shared,
        blocks_per_sm=blocks_per_multiprocessor(usage, num_warps, LIMITS[target]),
    )
    issued = {i for i in program.reachable if program.instructions[i].is_issued}
    hot = hot_code(program, compiled.asm["ttir"], logits, threads)
    regions = set().union(*(region for region, *_ in hot))
    straight = regions == program.reachable
    cost.loops = 0 if straight else len(hot)
    cost.instructions_outside = 0 if straight else len(issued - regions)
    if logits is None or not hot:
        return cost
    cost.instructions = sum(len(issued & region) / positions for region, positions, _ in hot)
    cost.special = sum(
        sum(bool(SPECIAL.match(program.instructions[i].opcode)) for i in region) / positions
        for region, positions, _ in hot
    )
    cost.bytes = sum(n_bytes for *_, n_bytes in hot)
    outside = cost.instructions_outside * threads * launch.programs / (logits.rows * logits.columns)
    cost.instructions_with_outside = cost.instructions + outside
    accesses = [program.instructions[i].access for i in regions]
    for kind, counts in (("load", cost.load_bytes), ("store", cost.store_bytes)):
        widths = Counter(str(access[1]) for access in accesses if access and access[0] == kind)
        counts.update(sorted(widths.items(), key=lambda item: -int(item[0])))
    cost.barriers = sum(program.instructions[i].is_barrier for i in regions)
    return cost


def measure(targets: Iterable[str], vocab: int = 151936, calls: Iterable[Call] = CALLS) -> list[Cost]:
    """Return the costs of every distinct variant that the calls launch, for each target."""
    recorded = [(call, record(call, vocab)) for call in calls]
    costs: dict[tuple[str, str], Cost] = {}
    for target in targets:
        for call, launches in recorded:
            for launch in launches:
                compiled = launch.compile(TARGETS[target])
                logits = logits_of(launch, vocab, call)
                key = target, compiled.hash
                if key not in costs:
                    costs[key] = cost_of(launch, compiled, target, logits, call.provider)
                passes = logits.rows * logits.columns / (TOKENS * vocab) if logits else 0.0
                costs[key].calls[call.name] = costs[key].calls.get(call.name, 0.0) + passes
    return list(costs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="result file (default: bench/results/kernel-costs.json)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("-k", default="", help="only calls whose provider and name contain this text")
    arguments = parser.parse_args()
    from kernel_report import cost_tables
    from suite import header, results_folder, write_json

    calls = [call for call in CALLS if arguments.k in f"{call.provider}, {call.name}"]
    rows = [asdict(cost) for cost in measure(arguments.target, arguments.vocab, calls)]
    content = {**header(), "vocab": arguments.vocab, "rows": rows}
    output = arguments.output or results_folder(small=bool(arguments.k)) / "kernel-costs.json"
    write_json(output.resolve(), content)
    print(json.dumps(content, indent=1) if arguments.json else cost_tables(content))
    print(output, file=sys.stderr)


if __name__ == "__main__":
    main()
