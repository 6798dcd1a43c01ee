"""`plan`: what a call would allocate and multiply, for a device that need not be present."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from cases import INTERPRETED
from fused_distill import LossPlan, fused_linear_jsd, plan
from fused_distill.chunked.lm_head import LMHead
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

GIB = 1 << 30
QWEN = 151936


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def gpu_plan(
    n: int = 8192,
    vocab: int = QWEN,
    sizes: tuple[int, int] = (2048, 4096),
    student: torch.dtype = torch.bfloat16,
    teacher: torch.dtype = torch.bfloat16,
    requires_grad: bool = True,
    **keywords: Any,
) -> LossPlan:
    ds, dt = sizes
    return plan(
        meta(n, ds, dtype=student, requires_grad=requires_grad),
        meta(vocab, ds, dtype=student, requires_grad=requires_grad),
        meta(n, dt, dtype=teacher),
        meta(vocab, dt, dtype=teacher),
        **{"device": "cuda", **keywords},
    )


@pytest.fixture
def autocast_to_bfloat16():
    # torch.autocast("cuda") does nothing where there is no GPU.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def test_gradients_of_a_gpu_take_far_more_rows_than_logits() -> None:
    planned = gpu_plan(workspace_bytes=3 * GIB // 2)
    assert 256 <= planned.rows <= 512
    assert planned.gradient_rows >= 1664
    assert planned.buffer_bytes <= 3 * GIB // 2


@pytest.mark.parametrize("workspace_bytes", [GIB // 2, GIB, 2 * GIB, 5 * GIB])
@pytest.mark.parametrize("vocab", [32001, QWEN, 262144])
def test_rows_of_a_gpu_are_multiples_of_a_products_tile(vocab: int, workspace_bytes: int) -> None:
    planned = gpu_plan(n=100_000, vocab=vocab, workspace_bytes=workspace_bytes)
    assert planned.rows % 128 == 0
    assert planned.gradient_rows % planned.rows == 0


def test_buffers_of_a_gpu_do_not_depend_on_the_number_of_tokens() -> None:
    buffers = [gpu_plan(n=n, workspace_bytes=GIB).buffers for n in (4096, 5000, 8191, 8192, 60_000)]
    assert all(other == buffers[0] for other in buffers)


def test_logit_gradients_are_balanced() -> None:
    sizes = [
        p.m for p in gpu_plan(n=8192, workspace_bytes=3 * GIB // 2).products if p.name == "hidden gradient"
    ]
    assert sizes == [2048]


def test_float32_gradients_of_a_gpu_overwrite_the_logits() -> None:
    planned = gpu_plan(student=torch.float32, workspace_bytes=GIB)
    assert planned.gradient_rows == planned.rows
    assert "logit gradient" not in planned.buffers


@pytest.mark.parametrize(
    ("sizes", "device_memory", "expected"),
    [
        ((1024, 1024), None, GIB),  # a small head
        ((1024, 1024), 80 * GIB, 2 * GIB),  # a fortieth of the device
        ((4096, 4096), 80 * GIB, 4 * QWEN * 4096),  # the float32 head
        ((4096, 4096), 24 * GIB, 24 * GIB // 16),  # a sixteenth of the device
        ((4096, 4096), 8 * GIB, GIB),
        ((4096, 4096), None, 4 * QWEN * 4096),
    ],
)
def test_default_workspace_of_a_gpu_follows_head_and_device(
    sizes: tuple[int, int], device_memory: int | None, expected: int
) -> None:
    assert gpu_plan(sizes=sizes, device_memory=device_memory).workspace_bytes == expected


@pytest.mark.usefixtures("autocast_to_bfloat16")
def test_default_workspace_makes_room_for_converted_heads() -> None:
    planned = gpu_plan(student=torch.float32, teacher=torch.float32, device_memory=80 * GIB)
    in_bfloat16 = gpu_plan(device_memory=80 * GIB)
    converted = {"converted student head": 2 * QWEN * 2048, "converted teacher head": 2 * QWEN * 4096}
    assert planned.buffers == in_bfloat16.buffers | converted
    assert planned.workspace_bytes == in_bfloat16.workspace_bytes + sum(converted.values())


@pytest.mark.usefixtures("autocast_to_bfloat16")
@pytest.mark.parametrize(
    ("workspace_bytes", "slices"), [(5 * GIB, None), (2 * GIB, 256 << 20), (100 << 20, 25 << 20)]
)
def test_heads_that_do_not_fit_half_the_workspace_are_converted_in_slices(
    workspace_bytes: int, slices: int | None
) -> None:
    planned = gpu_plan(student=torch.float32, teacher=torch.float32, workspace_bytes=workspace_bytes)
    assert planned.buffer_bytes <= workspace_bytes
    assert ("converted teacher head" in planned.buffers) == (slices is None)
    if slices is not None:
        assert 0.9 * slices < planned.buffers["slices of heads"] <= slices


@pytest.mark.usefixtures("autocast_to_bfloat16")
def test_smallest_workspace_of_a_gpu_is_the_one_that_the_error_names() -> None:
    options: dict[str, Any] = {"student": torch.float32, "teacher": torch.float32}
    with pytest.raises(ValueError, match=r"workspace_bytes must be at least \d+ ") as error:
        gpu_plan(**options, workspace_bytes=1)
    minimum = int(str(error.value).split("at least ")[1].split()[0])
    assert gpu_plan(**options, workspace_bytes=minimum).rows == 1
    with pytest.raises(ValueError, match=f"at least {minimum} "):
        gpu_plan(**options, workspace_bytes=minimum - 1)


@pytest.mark.parametrize(
    ("beta", "requires_grad", "launches"), [(0.0, True, 3), (0.5, True, 4), (0.5, False, 3)]
)
def test_number_of_kernel_launches_is_that_of_the_row_loss(
    beta: float, requires_grad: bool, launches: int
) -> None:
    pytest.importorskip("triton")
    from fused_distill.config import LossConfig
    from fused_distill.rows.base import StudentRows, TeacherRows
    from fused_distill.rows.full_triton import TritonJSD
    from triton.runtime.jit import JITFunction

    planned = gpu_plan(beta=beta, requires_grad=requires_grad)
    logits, weight = torch.zeros(3, 5), torch.ones(3)
    with mock.patch.object(JITFunction, "run") as run:
        TritonJSD()(
            StudentRows(logits, weight),
            TeacherRows(logits),
            LossConfig(beta=beta),
            grad=torch.empty(3, 5) if requires_grad else None,
        )
    assert planned.kernel_launches_per_chunk == run.call_count == launches


def test_products_cover_every_token_and_gradient_once() -> None:
    planned = gpu_plan(n=5000, workspace_bytes=GIB)
    operations: Counter[str] = Counter()
    for product in planned.products:
        operations[product.name] += product.operations
    of_student, of_teacher = (2 * 5000 * QWEN * size for size in (2048, 4096))
    assert operations == {
        "student logits": of_student,
        "teacher logits": of_teacher,
        "hidden gradient": of_student,
        "weight gradient": of_student,
    }


def test_evaluation_has_no_gradient_products_or_buffers() -> None:
    planned = gpu_plan(requires_grad=False)
    assert {p.name for p in planned.products} == {"student logits", "teacher logits"}
    assert planned.gradient_rows == planned.n_gradient_chunks == 0
    assert "logit gradient" not in planned.buffers


def test_plan_of_a_call_is_what_the_call_does() -> None:
    tensors = [torch.randn(size) for size in ((90, 8), (400, 8), (90, 6), (400, 6))]
    tensors[0].requires_grad_()
    options: dict[str, Any] = {
        "mask": torch.arange(90) % 3 > 0,
        "workspace_bytes": 300_000,
        "backend": "torch",
        "labels": torch.zeros(90, dtype=torch.int64),
        "hard_weight": 0.5,
        "token_weight": torch.ones(90),
    }
    planned = plan(*tensors, **options)
    rows: list[int] = []
    project = LMHead.project

    def spy(self: LMHead, hidden: Tensor, out: Tensor) -> Tensor:
        rows.append(len(hidden))
        return project(self, hidden, out)

    with mock.patch.object(LMHead, "project", spy):
        fused_linear_jsd(*tensors, **options)
    assert planned.n_tokens == 60
    assert planned.n_chunks > 1
    projections = [p for p in planned.products if p.name in ("student logits", "teacher logits")]
    assert sorted(rows) == sorted(p.m for p in projections for _ in range(p.count))
    assert planned.buffer_bytes <= planned.workspace_bytes == 300_000


def test_table_names_sizes_buffers_and_products() -> None:
    table = str(gpu_plan(workspace_bytes=3 * GIB // 2))
    assert "rows of logits         512 in 16 chunks" in table
    assert "all buffers            1,388" in table
    assert "4 x (151,936, 2,048) @ (2,048, 2,048) bfloat16" in table


def test_plan_accepts_the_hidden_state_of_one_token() -> None:
    planned = plan(torch.randn(4), torch.randn(9, 4), torch.randn(6), torch.randn(9, 6))
    assert planned.n_tokens == 1


def test_plan_needs_a_device_for_meta_tensors() -> None:
    with pytest.raises(ValueError, match="device must name the device to plan for"):
        gpu_plan(device=None)


def test_reference_has_no_plan() -> None:
    with pytest.raises(ValueError, match='backend must be "auto", "triton", "cpp" or "torch" for a plan'):
        gpu_plan(backend="reference")


def test_invalid_options_are_named() -> None:
    with pytest.raises(ValueError, match="beta must be between"):
        gpu_plan(beta=2.0)
    with pytest.raises(TypeError, match="betta"):
        gpu_plan(betta=0.5)
    with pytest.raises(ValueError, match="must agree in their last dimension"):
        plan(meta(3, 4), meta(9, 5), meta(3, 4), meta(9, 4), device="cuda")


def test_masked_tokens_of_meta_tensors_count_as_valid() -> None:
    mask = torch.empty(64, dtype=torch.bool, device="meta")
    assert gpu_plan(n=64, mask=mask).n_tokens == 64


def test_arguments_of_a_weight_function_are_taken() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    tensors = hidden, weight, hidden, weight
    position = torch.arange(6.0)
    planned = plan(*tensors, token_weight=lambda stats, position: position, token_data={"position": position})
    assert planned == plan(*tensors)
    with pytest.raises(ValueError, match="token_data"):
        plan(*tensors, token_weight=lambda stats, position: position, token_data={"position": position[1:]})
