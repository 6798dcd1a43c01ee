"""The predicted times follow from the counts by the formula of docs/performance.md."""

from __future__ import annotations

from typing import Any

import pytest
from cases import INTERPRETED
from kernel_report import CARDS, PREDICTED, cost_tables, kernel_seconds, predicted_table, product_seconds

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

H100 = CARDS["H100"]
POSITIONS = 8192 * 1000


def row(
    calls: dict[str, float], instructions: float | None, n_bytes: float, target: str = "sm_90"
) -> dict[str, Any]:
    return {
        "target": target,
        "provider": "fused-distill",
        "kernel": "some_kernel",
        "calls": calls,
        "registers": 40,
        "spilled": 0,
        "blocks_per_sm": 6,
        "loops": 1,
        "instructions": instructions,
        "special": 1.0,
        "instructions_outside": 99,
        "instructions_with_outside": instructions,
        "bytes": n_bytes,
        "load_bytes": {"16": 4},
        "store_bytes": {},
        "barriers": 0,
    }


def test_a_kernel_is_bound_by_instructions_or_by_bytes() -> None:
    issue_rate = 132 * 128 * 1.755e9 * 0.7
    many_instructions, many_bytes = row({}, 1000.0, 1.0), row({}, 1.0, 1000.0)
    other_target, no_logits = row({}, 1.0, 1.0, target="sm_100"), row({}, None, 0.0)
    kernels = [(kernel, 2.0) for kernel in (many_instructions, many_bytes, other_target, no_logits)]
    expected = 2 * POSITIONS * (1000 / issue_rate + 1000 / 3.0e12)
    assert kernel_seconds(H100, 1000, kernels) == pytest.approx(expected)


def test_large_products_take_their_operations_and_small_ones_their_bytes() -> None:
    large = 2 * (3 * 65536 + 4096) / 780e12
    assert product_seconds(H100, 1000, 65536, 4096) == pytest.approx(POSITIONS * large)
    n_bytes = 4 + 4 + 2 + 2 + (2 + 2) / 512 + (2 + 8) / 4096
    assert product_seconds(H100, 1000, 1, 1) == pytest.approx(POSITIONS * n_bytes / 3.0e12)


def test_tables_say_that_nothing_was_measured() -> None:
    rows = [row(dict.fromkeys(PREDICTED, 1.0), 50.0, 8.0, target) for target in ("sm_90", "sm_100")]
    content = {"vocab": 1000, "rows": rows}
    assert cost_tables(content).startswith("Counted in machine code, not measured")
    predicted = predicted_table(content)
    assert predicted.startswith("Predicted, not measured")
    assert len(predicted.splitlines()) == 4 + len(CARDS) * 3 * len(PREDICTED)


def test_totals_add_up_the_kernels_of_a_call() -> None:
    rows = [row({"beta 0": 1.0, "beta 1": 1.0}, 50.0, 8.0), row({"beta 0": 2.0}, 10.0, 4.0)]
    lines = cost_tables({"vocab": 1000, "rows": rows}).splitlines()
    assert "| fused-distill, beta 0 | 2 | 16 | 70 |" in lines
    assert "| fused-distill, beta 1 | 1 | 8 | 50 |" in lines
