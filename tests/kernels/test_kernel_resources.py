"""Kernels compiled for each GPU target, without a GPU, keep everything in registers."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from fused_distill_kernels import jsd as rows  # noqa: E402
from fused_distill_kernels.jsd import BLOCK, divergence_kernel, num_warps, statistics_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_REGISTERS_PER_THREAD = 255
SHARED_BYTES = 48 << 10
FLAGS = ("HAS_STUDENT_BIAS", "HAS_TEACHER_BIAS", "HAS_STUDENT_SOFTCAP", "HAS_TEACHER_SOFTCAP", "HAS_LABELS")
PASSES = {
    "loss": {"WANT_SUMS": True, "WANT_STATS": False, "WRITE_GRAD": False},
    "stats": {"WANT_SUMS": True, "WANT_STATS": True, "WRITE_GRAD": False},
    "gradient": {"WANT_SUMS": False, "WANT_STATS": False, "WRITE_GRAD": True},
    "all": {"WANT_SUMS": True, "WANT_STATS": True, "WRITE_GRAD": True},
}


def compile_kernel(
    kernel,
    target: GPUTarget,
    grad_dtype: str = "bf16",
    warps: int | None = None,
    types: dict[str, str] | None = None,  # of parameters that this function does not know
    **constants: object,
):
    pointers = {"grad_ptr": f"*{grad_dtype}", "labels_ptr": "*i64"}
    integers = (
        "student_stride",
        "teacher_stride",
        "logits_stride",
        "grad_stride",
        "n_columns",
        "n_tiles",
    )
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif types and name in types and not name.endswith("_ptr"):
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            signature[name] = {**pointers, **(types or {})}.get(name, "*fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in integers else "fp32"
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes
    )
    warps = warps or num_warps(bool(constants.get("WANT_STATS", False)))
    return triton.compile(source, target=target, options={"num_warps": warps})


def resources(compiled, target: GPUTarget, tmp_path: Path) -> dict[str, int]:
    """Return registers, spilled bytes and shared bytes, read from the binary."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        used = {name: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for name, key in HIP_KEYS.items()}  # pyright: ignore[reportOptionalSubscript]
        used["spilled"] += int(re.search(r"\.sgpr_spill_count:\s+(\d+)", text)[1])  # pyright: ignore[reportOptionalSubscript]
        return used
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    usage_by_name = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return {
        "registers": int(usage_by_name["REG"]),
        "spilled": int(usage_by_name["STACK"]) + int(usage_by_name["LOCAL"]),
        "shared": int(usage_by_name["SHARED"]),
    }


HIP_KEYS = {"registers": "vgpr_count", "spilled": "vgpr_spill_count", "shared": "group_segment_fixed_size"}


def assert_fits(compiled, target: GPUTarget, tmp_path: Path) -> None:
    used = resources(compiled, target, tmp_path)
    assert used["spilled"] == 0, used
    assert used["registers"] <= MAX_REGISTERS_PER_THREAD, used
    assert used["shared"] + compiled.metadata.shared <= SHARED_BYTES, used


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every-option"])
def test_statistics_kernel_does_not_spill(target: GPUTarget, every_option: bool, tmp_path: Path) -> None:
    compiled = compile_kernel(statistics_kernel, target, BLOCK=BLOCK, **dict.fromkeys(FLAGS, every_option))
    assert_fits(compiled, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("divergence", "name"),
    [
        *itertools.product((rows.FORWARD_KL, rows.REVERSE_KL, rows.MIXTURE), ("loss", "stats", "gradient")),
        (rows.FORWARD_KL, "all"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"divergence{value.value}",
)
def test_divergence_kernel_does_not_spill(target: GPUTarget, divergence, name: str, tmp_path: Path) -> None:
    # 128 tiles of 2048 columns: a vocabulary of 262144, the largest in use.
    for every_option in (False, True):
        compiled = compile_kernel(
            divergence_kernel,
            target,
            BLOCK=BLOCK,
            TILES=128,
            DIVERGENCE=divergence.value,
            **PASSES[name],
            **dict.fromkeys(FLAGS, every_option),
        )
        assert_fits(compiled, target, tmp_path)
