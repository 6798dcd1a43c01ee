"""Kernels compiled as they are launched, for each GPU target, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernel_costs import (
    CALLS,
    CLIPPED,
    DIVERGENCES,
    OURS,
    UNLIKE_TRANSFORMS,
    Call,
    Cost,
    full,
    measure,
    record,
    topk,
)
from machine_code import TARGETS

MAX_REGISTERS_PER_THREAD = 255
SHARED_BYTES = 48 << 10
MIN_THREADS = 512  # per multiprocessor, to hide the latency of memory
# On sm_100 the statistics kernel reads one spilled pointer per tile, which costs less than a fourth program.
SPILLED_BYTES = {"sm_100": {"statistics_kernel": 8}}
ROW_KERNELS = {"statistics_kernel", "divergence_sums_kernel", "gradient_kernel"}
# Instructions and bytes per logit position of a step, for sm_90.
BUDGETS = {
    "beta 0, statistics": (90, 18),
    "beta 1, statistics": (110, 18),
    "beta 0.5, statistics": (190, 26),
    "beta 0.3, statistics": (240, 26),
    "skewed KL, statistics": (240, 26),
    "mixed KL, statistics": (110, 18),
    "total variation": (90, 26),
    "total variation, statistics": (90, 26),
}
SOFTCAP_FACTOR = 1.5  # of the instructions


# A support of more columns than a program holds at once, with every divergence, tail and option.
TOPK_256 = [
    Call(
        OURS,
        f"top-k, {tail}, beta {beta:g}{', every option' * every_option}",
        topk(every_option, 256, tail=tail, beta=beta),
    )
    for tail in ("bucket", "renormalize", "truncate")
    for beta in (0.0, 0.5, 1.0)
    for every_option in (False, True)
] + [
    Call(OURS, f"top-k, {name}, every option", topk(True, 256, **options))
    for name, options in {"skewed KL": DIVERGENCES["skewed KL"], **CLIPPED}.items()
]


@pytest.fixture(scope="module", params=TARGETS)
def costs(request: pytest.FixtureRequest) -> list[Cost]:
    """Return what each variant of each kernel costs on one target, V 151936."""
    return measure([request.param], calls=[call for call in CALLS if call.provider == OURS])


def named(costs: list[Cost]) -> dict[str, Cost]:
    """Return the costs by kernel and first call, for a failing test to name them."""
    return {f"{cost.kernel} of {next(iter(cost.calls))}": cost for cost in costs}


def test_kernels_do_not_spill(costs: list[Cost]) -> None:
    allowed = SPILLED_BYTES.get(costs[0].target, {})
    spilled = {name: c.spilled for name, c in named(costs).items() if c.spilled > allowed.get(c.kernel, 0)}
    assert spilled == {}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_a_support_of_256_columns_do_not_spill(target: str) -> None:
    costs = measure([target], calls=TOPK_256)
    assert {"support_loss_kernel", "take_support_kernel"} <= {cost.kernel for cost in costs}
    assert {name: cost.spilled for name, cost in named(costs).items() if cost.spilled} == {}
    assert [name for name, cost in named(costs).items() if cost.registers > MAX_REGISTERS_PER_THREAD] == []


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for_logits_that_are_not_transformed_alike(target: str) -> None:
    costs = measure([target], calls=UNLIKE_TRANSFORMS)
    calls = {(cost.kernel, call) for cost in costs for call in cost.calls}
    assert {(kernel, call.name) for kernel in ROW_KERNELS for call in UNLIKE_TRANSFORMS} <= calls


@pytest.mark.parametrize("vocab", [1, 2])
@pytest.mark.parametrize("run", [full(return_stats=True), topk(support=1)], ids=["full", "topk"])
def test_kernels_compile_for_the_smallest_sizes(run: Callable[[int], Any], vocab: int) -> None:
    """The compiler makes constants of integers equal to 1, which the interpreter does not."""
    launches = record(Call(OURS, "", run), vocab)
    assert launches
    for launch in launches:
        launch.compile(TARGETS["sm_90"])


def test_kernels_leave_room_for_other_blocks(costs: list[Cost]) -> None:
    for name, cost in named(costs).items():
        assert cost.registers <= MAX_REGISTERS_PER_THREAD, name
        assert cost.shared_bytes <= SHARED_BYTES, name
        threads_per_block = cost.num_warps * TARGETS[cost.target].warp_size
        assert cost.blocks_per_sm * threads_per_block >= MIN_THREADS, name


def test_row_kernels_run_four_blocks_of_eight_warps_per_multiprocessor(costs: list[Cost]) -> None:
    rows = [cost for cost in costs if cost.kernel in ROW_KERNELS and cost.target.startswith("sm_")]
    assert [name for name, cost in named(rows).items() if cost.blocks_per_sm < 4 or cost.num_warps != 8] == []


def test_no_thread_of_a_row_kernel_waits_for_others_in_a_loop(costs: list[Cost]) -> None:
    rows = [cost for cost in costs if cost.kernel in ROW_KERNELS]
    assert rows
    assert [name for name, cost in named(rows).items() if cost.barriers] == []


def test_half_precision_gradients_are_stored_16_bytes_at_once(costs: list[Cost]) -> None:
    gradients = [cost for cost in costs if cost.kernel == "gradient_kernel"]
    assert gradients
    for name, cost in named(gradients).items():
        assert set(cost.store_bytes) == {"8" if "clipped" in name else "16"}, name


def test_logits_are_loaded_in_vectors(costs: list[Cost]) -> None:
    # 16 bytes, or 8 where a block of 1024 threads holds two columns per thread.
    over_logits = [cost for cost in costs if cost.instructions is not None]
    assert over_logits
    assert [cost for cost in over_logits if not {"8", "16"} & set(cost.load_bytes)] == []


def test_rows_of_an_odd_vocabulary_are_loaded_and_stored_16_bytes_at_once() -> None:
    calls = [c for c in CALLS if (c.provider, c.name) == (OURS, "beta 0.5, statistics")]
    rows = [cost for cost in measure(["sm_90"], 50257, calls) if cost.kernel in ROW_KERNELS]
    assert {cost.kernel for cost in rows} == ROW_KERNELS
    for name, cost in named(rows).items():
        assert set(cost.load_bytes) == {"16"}, name
        assert set(cost.store_bytes) <= {"16"}, name


def instructions_and_bytes(name: str) -> tuple[float, float]:
    """Return what a call's kernels take together per logit position, for sm_90."""
    costs = measure(["sm_90"], calls=[c for c in CALLS if (c.provider, c.name) == (OURS, name)])
    return sum(cost.instructions or 0 for cost in costs), sum(cost.bytes or 0 for cost in costs)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget(name: str) -> None:
    instructions, n_bytes = instructions_and_bytes(name)
    assert 0 < instructions <= BUDGETS[name][0]
    assert 0 < n_bytes <= BUDGETS[name][1]


@pytest.mark.parametrize("name", [name for name in BUDGETS if name.startswith("beta")])
def test_a_step_with_a_softcap_stays_within_its_budget(name: str) -> None:
    instructions, n_bytes = instructions_and_bytes(f"{name}, softcap")
    assert 0 < instructions <= SOFTCAP_FACTOR * BUDGETS[name][0]
    assert 0 < n_bytes <= BUDGETS[name][1]
