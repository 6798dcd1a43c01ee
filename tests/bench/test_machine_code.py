"""Counting machine code: small kernels whose instructions, bytes and loops are known."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from kernel_costs import Call, Cost, Shape, cost_of, record
from launches import Launch, recorded_launches
from machine_code import LIMITS, TARGETS, Usage, blocks_per_multiprocessor, parse_amdgcn, parse_sass

COLUMNS = 1 << 16


@triton.jit
def straight_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.load(x_ptr + columns, mask=inside) + tl.load(y_ptr + columns, mask=inside)
    tl.store(out_ptr + columns, total.to(tl.bfloat16), mask=inside)


@triton.jit
def looping_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(n // BLOCK):
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(x_ptr + columns)) * tl.load(y_ptr + columns)
    columns = n // BLOCK * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total += tl.load(x_ptr + columns, mask=inside, other=0.0) * tl.load(
        y_ptr + columns, mask=inside, other=0.0
    )
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def block_sum_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = 0.0
    for tile in range(n // BLOCK):
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + columns) * tl.load(y_ptr + columns), 0)  # pyright: ignore[reportOperatorIssue]
    tl.store(out_ptr, total)


def launch_of(kernel: Any, columns: int = COLUMNS, offset: int = 0) -> Launch:
    x, y = torch.empty(1, columns + offset)[:, offset:], torch.empty(1, columns)
    with recorded_launches() as launches:
        kernel[(1,)](x, y, torch.empty(1, columns, dtype=torch.bfloat16), columns, BLOCK=2048, num_warps=8)
    (launch,) = launches
    return launch


def cost(kernel: Any, target: str = "sm_90", **options: int) -> Cost:
    launch = launch_of(kernel, **options)
    shape = Shape({"x_ptr", "y_ptr", "out_ptr"}, 1, options.get("columns", COLUMNS))
    return cost_of(launch, launch.compile(TARGETS[target]), target, shape, "test")


@pytest.mark.parametrize("target", TARGETS)
def test_straight_line_code_counts_all_instructions(target: str) -> None:
    found = cost(straight_kernel, target)
    assert found.loops == found.instructions_outside == found.barriers == 0
    assert found.bytes == 4 + 4 + 2
    assert found.instructions is not None
    assert 2 < found.instructions < 40
    assert set(found.load_bytes) == {"16"}
    assert found.spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_loop_counts_its_unmasked_body_only(target: str) -> None:
    found = cost(looping_kernel, target)
    assert found.loops == 1
    assert found.bytes == 8
    assert found.instructions is not None
    assert found.special is not None
    assert 3 < found.instructions < 30
    assert found.special == pytest.approx(1)  # one exponential per position
    assert found.barriers == 0
    assert found.instructions_outside > 50  # the tail and the reduction


def test_barriers_inside_a_loop_are_counted() -> None:
    assert cost(block_sum_kernel).barriers >= 1


def test_the_recorded_alignment_and_divisibility_decide_the_width_of_loads() -> None:
    assert set(cost(looping_kernel).load_bytes) == {"16"}
    assert "4" in cost(looping_kernel, offset=1).load_bytes
    assert set(cost(straight_kernel, columns=COLUMNS + 1).load_bytes) == {"4"}


def test_recorded_launches_run_nothing_and_hold_grid_and_arguments() -> None:
    launch = launch_of(straight_kernel)
    assert launch.grid == (1,)
    assert launch.arguments["n"] == COLUMNS
    assert launch.arguments["num_warps"] == 8


def test_a_grid_may_be_a_function_of_the_arguments() -> None:
    x = torch.empty(1, 4096)
    with recorded_launches() as launches:
        kernel: Any = straight_kernel[lambda arguments: (arguments["n"] // arguments["BLOCK"],)]
        kernel(x, x, x, 4096, BLOCK=2048)
    assert launches[0].programs == 2


def test_an_unconditional_jump_ends_a_block_and_unreachable_padding_is_left_out() -> None:
    program = parse_sass(
        """
        /*0000*/   MOV R1, R2 ;
.L_x_1:
        /*0010*/   LDG.E.128 R4, [R2.64] ;
        /*0020*/   @P0 BRA `(.L_x_1) ;
        /*0030*/   EXIT ;
.L_x_2:
        /*0040*/   BRA `(.L_x_2);
        /*0050*/   NOP;
"""
    )
    assert program.reachable == {0, 1, 2, 3}
    assert program.loops() == [{1, 2}]
    assert program.loaded_bytes({1, 2}) == 16


def test_a_loop_over_a_small_table_is_no_loop_over_tiles() -> None:
    program = parse_amdgcn(
        """
.LBB0_1:
	global_load_dword v1, v2, s[0:1]
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	buffer_load_dwordx4 v[2:5], v2, s[28:31], 0 offen
	buffer_load_dwordx4 v[6:9], v2, s[28:31], 0 offen
	s_cbranch_scc1 .LBB0_2
	s_endpgm
.Lfunc_end0:
	s_nop 0
"""
    )
    assert program.loops() == [{0, 1}, {2, 3, 4}]
    assert program.tile_loops() == [{2, 3, 4}]


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"), [(32, 1024, 8), (40, 1024, 6), (48, 1024, 5), (32, 64 << 10, 3)]
)
def test_registers_and_shared_memory_limit_the_blocks_of_an_h100(
    registers: int, shared: int, blocks: int
) -> None:
    assert blocks_per_multiprocessor(Usage(registers, 0, shared), 8, LIMITS["sm_90"]) == blocks


def test_a_call_without_triton_kernels_records_none() -> None:
    assert record(Call("test", "nothing", lambda vocab: torch.zeros(vocab)), 100) == []
