"""Tables of the kernel costs that bench/kernel_costs.py counts, and times predicted from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models import QWEN3, QWEN3_LARGE, QWEN3_MEDIUM

Row = dict[str, Any]


def by_call(rows: list[Row]) -> dict[tuple[str, str], list[tuple[Row, float]]]:
    """Return, by provider and call, each kernel and how often it passes over all logits."""
    calls: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    for row in rows:
        for call, passes in row["calls"].items():
            calls.setdefault((row["provider"], call), []).append((row, passes))
    return calls


def totals_table(rows: list[Row]) -> list[str]:
    """Return one line per call: instructions on each target, and bytes, of all its kernels together."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| | kernels | bytes | {' | '.join(f'instructions, {target}' for target in targets)} |",
        "|---" * (3 + len(targets)) + "|",
    ]
    for (provider, call), kernels in by_call(rows).items():
        counted = [[kernel for kernel in kernels if kernel[0]["target"] == target] for target in targets]
        numbers = [
            len(counted[0]),
            _total(counted[0], "bytes"),
            *(_total(of_target, "instructions_with_outside") for of_target in counted),
        ]
        lines.append(f"| {provider}, {call} | {' | '.join(f'{number:.0f}' for number in numbers)} |")
    return lines


def _total(kernels: list[tuple[Row, float]], key: str) -> float:
    """Return the sum of a cost per position over the kernels that pass over logits."""
    return sum(row[key] * passes for row, passes in kernels if row[key] is not None)


def kernels_table(rows: list[Row], target: str) -> list[str]:
    """Return one line per variant of a kernel on one target."""
    headings = (
        "kernel", "launched by", "instructions", "special", "bytes", "outside the loop", "barriers",
        "loads, bytes wide", "stores, bytes wide", "registers", "spilled", "blocks per SM",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows:
        if row["target"] != target:
            continue
        first, *others = row["calls"]
        launched_by = f"{row['provider']}, {first}" + (f", and {len(others)} more" if others else "")
        costs = [
            f"{row[key]:.1f}" if row[key] is not None else "" for key in ("instructions", "special", "bytes")
        ]
        outside = str(row["instructions_outside"]) if row["loops"] else "no loop"
        widths = [
            ", ".join(f"{count} x {width}" for width, count in row[key].items())
            for key in ("load_bytes", "store_bytes")
        ]
        cells = [f"`{row['kernel']}`", launched_by, *costs, outside, str(row["barriers"]), *widths]
        cells += [str(row[key]) for key in ("registers", "spilled", "blocks_per_sm")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cost_tables(content: dict[str, Any], target: str = "sm_90") -> str:
    """Return the totals of each call on all targets, and the kernels on one."""
    rows = content["rows"]
    shown = target if any(row["target"] == target for row in rows) else rows[0]["target"]
    return "\n".join(
        [
            f"Counted in machine code, not measured; per logit position, V {content['vocab']}:",
            "",
            *totals_table(rows),
            "",
            f"The kernels, compiled for {shown}:",
            "",
            *kernels_table(rows, shown),
            "",
        ]
    )


@dataclass(frozen=True)
class Card:
    """The inputs of the model that belong to a GPU."""

    target: str
    flops: float  # per second that cuBLAS reaches on large bfloat16 products
    bandwidth: float  # bytes per second that copies reach
    lanes: int  # thread-instructions issued per cycle: multiprocessors x 128
    clock: float  # cycles per second

    @property
    def instructions(self) -> float:
        """Thread-instructions per second at ISSUE_EFFICIENCY."""
        return self.lanes * self.clock * ISSUE_EFFICIENCY


ISSUE_EFFICIENCY = 0.7
CARDS = {
    "H100": Card("sm_90", 780e12, 3.0e12, 132 * 128, 1.755e9),
    "H200": Card("sm_90", 780e12, 4.3e12, 132 * 128, 1.755e9),
    "B200": Card("sm_100", 1460e12, 7.0e12, 148 * 128, 1.85e9),
}
TOKENS = 8192
DIMENSIONS = [pair.dims for pair in (QWEN3, QWEN3_MEDIUM, QWEN3_LARGE)]
LOGIT_ROWS, GRADIENT_ROWS = 512, 4096  # of `fused_distill.plan` for these sizes and 80 GB of memory
PREDICTED = ("beta 0", "beta 0.5", "beta 1", "beta 0.5, statistics")


def product_seconds(card: Card, vocab: int, student_dim: int, teacher_dim: int) -> float:
    """Return the time of the four products in chunks, each bound by operations or by bytes."""
    positions = TOKENS * vocab
    bytes_per_position = [
        (student_dim, 4 + 2 * student_dim / LOGIT_ROWS),  # writes float32 logits, reads the head
        (teacher_dim, 4 + 2 * teacher_dim / LOGIT_ROWS),
        (student_dim, 2 + 2 * student_dim / GRADIENT_ROWS),  # hidden gradient: reads logit gradient and head
        (student_dim, 2 + 8 * student_dim / GRADIENT_ROWS),  # weight gradient: accumulates in float32
    ]
    return positions * sum(max(2 * dim / card.flops, n / card.bandwidth) for dim, n in bytes_per_position)


def kernel_seconds(card: Card, vocab: int, kernels: list[tuple[Row, float]]) -> float:
    """Return the time of the row kernels, each bound by instructions or by bytes."""
    return (TOKENS * vocab) * sum(
        passes * max(row["bytes"] / card.bandwidth, row["instructions_with_outside"] / card.instructions)
        for row, passes in kernels
        if row["target"] == card.target and row["instructions"] is not None
    )


def predicted_table(content: dict[str, Any]) -> str:
    """Return predicted times of steps, their parts, and their ratio to the four products alone."""
    calls, vocab = by_call(content["rows"]), content["vocab"]
    lines = [
        f"Predicted, not measured; N {TOKENS}, V {vocab}, bfloat16, times in ms:",
        "",
        "| card | Ds, Dt | call | four products alone | products in chunks | row kernels | total | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, card in CARDS.items():
        for student_dim, teacher_dim in DIMENSIONS:
            floor = 2 * TOKENS * vocab * (3 * student_dim + teacher_dim) / card.flops
            products = product_seconds(card, vocab, student_dim, teacher_dim)
            rounding = 6 * vocab * student_dim / card.bandwidth
            for call in PREDICTED:
                kernels = kernel_seconds(card, vocab, calls["fused-distill", call])
                total = products + kernels + rounding
                times = " | ".join(f"{1000 * seconds:.1f}" for seconds in (floor, products, kernels, total))
                lines.append(
                    f"| {name} | {student_dim}, {teacher_dim} | {call} | {times} | {total / floor:.2f} |"
                )
    return "\n".join([*lines, ""])
