"""Kernels of the top-k losses compiled for each GPU target, without a GPU, keep everything in registers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from test_kernel_resources import TARGETS, assert_fits, compile_kernel, resources  # skips if need be

from fused_distill_kernels import indexed, support_columns, tail  # isort: skip
from fused_distill_kernels.support import BUCKET, RENORMALIZE, TRUNCATE, support_loss_kernel  # isort: skip

INTEGERS = {"k", "n_parts", "n_columns", "n_entries", "first_column", "width", "ids_step", "logprobs_step"}
INTEGERS |= {f"{name}_stride" for name in ("grad", "logits", "ids", "logprobs", "hidden", "weight", "out")}
LONG = {"columns_ptr", "sorted_columns_ptr", "order_ptr", "tokens_ptr", "ids_ptr", "labels_ptr"}
DOUBLE = {"y_ptr", "label_y_ptr", "tail_ptr", "statistics_ptr"}
HALF = {"grad_ptr", "label_grad_ptr", "support_grad_ptr"}
TYPES = {
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(LONG, "*i64"),
    **dict.fromkeys(DOUBLE, "*fp64"),
    **dict.fromkeys(HALF, "*bf16"),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def compile_for(kernel: Any, target: Any, warps: int, every_option: bool, **constants: Any) -> Any:
    """Compile a kernel with all or none of its options, but for the given ones."""
    names = [n for n in kernel.arg_names if n.startswith(("HAS_", "WANT_", "TWO_", "GATHER"))]
    return compile_kernel(
        kernel, target, warps=warps, types=TYPES, **{**dict.fromkeys(names, every_option), **constants}
    )


@every_target
@pytest.mark.parametrize("k", [64, 256])
@pytest.mark.parametrize(
    ("tail_option", "divergence"),
    itertools.product((BUCKET, RENORMALIZE, TRUNCATE), range(3)),
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_support_loss_kernel_does_not_spill_to_memory(
    target: Any, k: int, tail_option: Any, divergence: int, tmp_path: Path
) -> None:
    block = support_columns.support_block(k)
    for every_option in (False, True):
        compiled = compile_for(
            support_loss_kernel,
            target,
            support_columns.support_warps(block),
            every_option,
            WANT_GRAD=True,
            HAS_TAIL=every_option or tail_option is not RENORMALIZE,
            DIVERGENCE=divergence,
            TAIL=tail_option.value,
            PARTS=tail.MAX_PARTS,
            BLOCK=block,
        )
        if target.backend == "hip":
            # Scalar registers may move to lanes of vector registers, which costs no memory.
            assert ".private_segment_fixed_size: 0" in compiled.asm["amdgcn"]
            assert resources(compiled, target, tmp_path)["registers"] <= 255
        else:
            assert_fits(compiled, target, tmp_path)


@every_target
@pytest.mark.parametrize("name", ["unique_entries_kernel", "take_support_kernel", "put_support_kernel"])
def test_column_kernels_do_not_spill(target: Any, name: str, tmp_path: Path) -> None:
    kernel = getattr(support_columns, name)
    block = support_columns.support_block(256)
    earlier = {"EARLIER": support_columns.EARLIER} if name == "unique_entries_kernel" else {}
    for every_option in (False, True):
        warps = support_columns.support_warps(block)
        compiled = compile_for(kernel, target, warps, every_option, BLOCK=block, **earlier)
        assert_fits(compiled, target, tmp_path)


@every_target
@pytest.mark.parametrize("name", ["tail_statistics_kernel", "tail_gradient_kernel"])
def test_tail_kernels_do_not_spill(target: Any, name: str, tmp_path: Path) -> None:
    for every_option in (False, True):
        compiled = compile_for(getattr(tail, name), target, tail.NUM_WARPS, every_option, BLOCK=tail.BLOCK)
        assert_fits(compiled, target, tmp_path)


@every_target
@pytest.mark.parametrize("name", ["project", "back_project", "weight_gradient"])
def test_indexed_kernels_do_not_spill(target: Any, name: str, tmp_path: Path) -> None:
    kernel = getattr(indexed, f"indexed_{name}_kernel")
    sizes = {"ENTRIES": indexed.ENTRIES, "WIDTH": indexed.WIDTH}
    assert_fits(compile_for(kernel, target, indexed.NUM_WARPS, False, **sizes), target, tmp_path)
