"""The product with float32 output, compiled for each GPU target without a GPU, does not spill registers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from fused_distill_kernels import matmul as module  # noqa: E402
from fused_distill_kernels.matmul import matmul_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LARGEST_SHARED_BYTES = 64 << 10  # of a gfx942


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_kernel_does_not_spill(target: GPUTarget, accumulate: bool, dtype: str, tmp_path: Path) -> None:
    names = matmul_kernel.arg_names
    # The layout of the logits' projection: rows of a, and columns of b, are contiguous.
    constants = {
        "a_column_stride": 1,
        "b_row_stride": 1,
        "out_column_stride": 1,
        "ACCUMULATE": accumulate,
        "BLOCK_M": module.BLOCK_M,
        "BLOCK_N": module.BLOCK_N,
        "BLOCK_K": module.BLOCK_K,
        "GROUP": module.ROW_BLOCKS_PER_GROUP,
    }
    pointers = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": "*fp32"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(
        matmul_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, divisible
    )
    options = {"num_warps": module.NUM_WARPS, "num_stages": module.NUM_STAGES}
    compiled = triton.compile(source, target=target, options=options)
    assert spilled_bytes(compiled, target, tmp_path) == 0
    assert compiled.metadata.shared <= LARGEST_SHARED_BYTES


def spilled_bytes(compiled, target: GPUTarget, tmp_path: Path) -> int:
    if target.backend == "hip":
        return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
