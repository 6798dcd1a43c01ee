"""Row arithmetic that was to be compiled but runs eagerly: memory, warnings and results."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, TOPK, Case
from checks import assert_results_close
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd
from fused_distill.config import LossConfig, TopKLossConfig
from fused_distill.rows import backend as rows_backend
from fused_distill.rows import compiled as rows_compiled
from fused_distill.rows.compiled import StageRunner
from peak_memory import PeakMemory
from torch import Tensor

pytestmark = pytest.mark.skipif(BACKEND == "triton", reason="about torch.compile")


@pytest.fixture(autouse=True)
def small_problems_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    rows_compiled.compiled_stage.cache_clear()
    monkeypatch.setattr(rows_backend, "_COMPILE_MIN_LOGITS", 1)
    monkeypatch.setattr(rows_compiled.Compiler, "works", True)
    monkeypatch.setattr(rows_compiled.Compiler, "warned", False)


def tensors(n: int = 300, vocab: int = 3000, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((n, 16), (vocab, 16), (n, 24), (vocab, 24))
    hs, ws, ht, wt = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return [hs.requires_grad_(), ws.requires_grad_(), ht, wt]


def top_k_tensors(n: int = 300, vocab: int = 3000) -> list[Tensor]:
    hs, ws, ht, wt = tensors(n, vocab)
    top = torch.log_softmax(ht @ wt.T, -1).topk(8)
    return [hs, ws, top.values, top.indices]


def failing(stage: Any) -> Callable[..., Any]:
    def compiled(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    return compiled


def raising(error: Exception) -> Callable[..., Any]:
    def compiled_stage(stage: Any) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            raise error

        return compiled

    return compiled_stage


WHY_EAGER: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "dispatch mode": nullcontext,  # that which measures the memory
    "TORCHDYNAMO_DISABLE": lambda: torch._dynamo.config.patch(disable=True),
}


@pytest.mark.parametrize("workspace_bytes", [2 << 20, 8 << 20, 32 << 20])
@pytest.mark.parametrize("why", [*WHY_EAGER, "error"])
@pytest.mark.parametrize("function", [fused_linear_jsd, fused_linear_topk_jsd])
@pytest.mark.filterwarnings("ignore:fused_distill. torch.compile")
def test_memory_stays_within_the_workspace_without_compiled_rows(
    function: Any, why: str, workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors() if function is fused_linear_jsd else top_k_tensors()
    if why == "error":
        monkeypatch.setattr(rows_compiled, "compiled_stage", failing)
    gc.collect()
    with WHY_EAGER.get(why, nullcontext)(), PeakMemory(inputs) as memory:
        loss, _ = function(*inputs, workspace_bytes=workspace_bytes, return_stats=True, backend="torch")
    gradient_bytes = 4 * (inputs[0].numel() + inputs[1].numel())
    per_token = 64 * len(inputs[0]) + (0 if function is fused_linear_jsd else 8 * inputs[3].numel())
    assert loss > 0
    assert memory.peak > gradient_bytes + workspace_bytes // 8  # the measurement sees the logits
    assert memory.peak <= gradient_bytes + per_token + workspace_bytes


@pytest.mark.parametrize("why", ["force_eager", "TORCHDYNAMO_DISABLE"])
@pytest.mark.parametrize("functions", ["full", "top-k"])
def test_uncompiled_rows_warn_once_and_leave_the_result_unchanged(why: str, functions: str) -> None:
    case = full_case() if functions == "full" else top_k_case()
    expected = case.oracle()
    with warnings.catch_warnings(record=True) as caught, WHY_EAGER[why]():
        warnings.simplefilter("always")
        results = [case.run("torch") for _ in range(3)]
    messages = [w.message for w in caught if "torch.compile is disabled" in str(w.message)]
    assert [type(message) for message in messages] == [RuntimeWarning]
    for result in results:
        assert_results_close(result, expected, 1e-5)


def full_case(**options: Any) -> Case:
    hs, ws, ht, wt = (t.detach() for t in tensors(70, 200))
    return Case((hs, ws, ht, wt), {}, options)


def top_k_case(**options: Any) -> Case:
    hs, ws, logprobs, ids = (t.detach() for t in top_k_tensors(70, 200))
    return Case((hs, ws, logprobs, ids), {}, options, TOPK)


def test_rows_are_compiled_again_after_a_time_without_compilation() -> None:
    case = full_case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.compiler.set_stance("force_eager"):
            case.run("torch")
    compiled = counting(rows_compiled._compile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_compiled, "_compile", compiled)
        patch.setattr(torch, "compile", with_eager_backend(torch.compile))
        case.run("torch")
        case.run("torch")
    assert compiled.calls == 4  # each stage once  # pyright: ignore[reportFunctionMemberAccess]
    assert rows_compiled.Compiler.works


def counting(function: Any) -> Any:
    def counted(*args: Any) -> Any:
        counted.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
        return function(*args)

    counted.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    return counted


def with_eager_backend(compile: Any) -> Any:
    """Return torch.compile without its code generation, which takes seconds and changes nothing here."""
    return lambda function, **options: compile(function, **{**options, "backend": "eager"})


# Three variants of the stages that depend on the divergence, or of all.
VARIANTS = {
    "full": [{"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}],
    "top-k": [{}, {"student_softcap": 5.0}, {"temperature": 1.5, "hard_weight": 0.5}],
}


@pytest.mark.parametrize("functions", VARIANTS)
def test_more_variants_of_a_loss_than_torch_recompiles_are_all_compiled(
    functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", with_eager_backend(torch.compile))
    case = full_case() if functions == "full" else top_k_case()
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for options in VARIANTS[functions]:
            keywords = {"labels": torch.arange(70)} if "hard_weight" in options else {}
            Case(case.tensors, keywords, options, case.functions).run("torch")
    assert rows_compiled.Compiler.works
    assert not rows_compiled.Compiler.warned


@pytest.mark.parametrize("limit_is_reached_by", ["the number of threads", "equal sizes"])
def test_a_variant_at_torchs_limit_of_recompilations_is_compiled_afresh(
    limit_is_reached_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", with_eager_backend(torch.compile))
    runner = StageRunner(compiled=True, plans_for_eager=False)

    def stage(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (x.sum(-1) + y.sum(-1),)

    threads = torch.get_num_threads()
    try:
        with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            for i in range(2, 8):
                if limit_is_reached_by == "the number of threads":
                    torch.set_num_threads(i % 2 + 1)
                x, y = torch.ones(i, 3), torch.ones(i, 3 if i % 2 else 4 + i)
                (result,) = runner.run(stage, lambda _, x=x, y=y: (x, y), i, block_rows=None)
                assert torch.equal(result, x.sum(-1) + y.sum(-1))
    finally:
        torch.set_num_threads(threads)
    assert rows_compiled.Compiler.works


class WrappedError(Exception):
    """An error of the compiler that names another as its cause, as torch.compile raises it."""

    def __init__(self, inner: Exception) -> None:
        super().__init__(str(inner))
        self.inner_exception = inner


NO_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError(),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory"),
    "wrapped": WrappedError(torch.OutOfMemoryError("CUDA out of memory")),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_an_out_of_memory_error_is_raised_and_not_taken_for_a_missing_compiler(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NO_MEMORY[kind]
    monkeypatch.setattr(rows_compiled, "compiled_stage", raising(error))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(type(error)) as raised:
            fused_linear_jsd(*tensors(7, 50), backend="torch")
    assert raised.value is error
    assert rows_compiled.Compiler.works


@pytest.mark.parametrize("config", [LossConfig(), TopKLossConfig()])
def test_eager_blocks_of_other_devices_than_a_cpu_keep_them_busy(config: LossConfig) -> None:
    k = 4 if isinstance(config, TopKLossConfig) else None
    workspaces = [
        rows_backend.make_row_loss(
            "torch", config, k, torch.device(device), n_logits=0, sharded=False
        ).workspace(1024, torch.float32)
        for device in ("cpu", "cuda", "mps")
    ]
    assert [w.block_rows * 1024 >= 1 << 25 for w in workspaces] == [False, True, True]
    assert all(w.per_block_row >= 1024 * 4 for w in workspaces)
