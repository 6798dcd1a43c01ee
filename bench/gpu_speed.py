"""Checks of a first run on a GPU that concern time, memory and the queue of kernels."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from first_run_checks import CheckResult, CheckSkipped, Setting, check, relative_error
from fused_distill import fused_linear_jsd
from providers import FLOOR, Case, make_inputs, make_step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MAX_KERNELS_PER_CHUNK = 20
MAX_RATIO_FOR_ODD_VOCABULARY = 1.15
SLACK_BYTES = 64 << 20  # cuBLAS' own memory and the allocator's rounding
ALARMS = {
    r"sgemm": "a float32 product without tensor cores",
    r"align[12](?!\d)": "a product of matrices whose rows are not aligned",
    r"splitKreduce": "a product that is split and added up in a second kernel",
    r"Memcpy DtoH": "a copy from the GPU, for which the host waits",
}


def inputs_of(setting: Setting, vocab: int | None = None, tokens: int | None = None) -> list[Tensor]:
    """Return hidden states and heads of student and teacher in bfloat16; the student's require gradients."""
    student_dim, teacher_dim = setting.dimensions[min(1, len(setting.dimensions) - 1)]
    case = Case(
        tokens or setting.tokens, vocab or setting.vocab, student_dim, teacher_dim,
        dtype="bfloat16", device=str(setting.device),
    )  # fmt: skip
    return list(make_inputs(case))


def step_of(inputs: list[Tensor], **options: Any) -> Callable[[], Tensor]:
    """Return a step that computes the loss and both gradients."""

    def step() -> Tensor:
        for tensor in inputs:
            tensor.grad = None
        loss = fused_linear_jsd(*inputs, **options)
        (loss[0] if options.get("return_stats") else loss).backward()
        return loss[0] if options.get("return_stats") else loss

    return step


@check("time of a step relative to the products alone")
def floor_and_ours(setting: Setting) -> CheckResult:
    result = CheckResult()
    for student_dim, teacher_dim in setting.dimensions:
        case = Case(
            setting.tokens,
            setting.vocab,
            student_dim,
            teacher_dim,
            dtype="bfloat16",
            device=str(setting.device),
        )
        inputs = make_inputs(case)
        floor = setting.seconds(make_step(FLOOR, case, inputs))
        for options in ({"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"beta": 0.5, "return_stats": True}):
            seconds = setting.seconds(step_of(list(inputs), **options))
            row = {
                "Ds": student_dim,
                "Dt": teacher_dim,
                **options,
                "floor ms": 1000 * floor,
                "ms": 1000 * seconds,
            }
            result.rows.append({**row, "ratio": seconds / floor})
    return result


def alarms(counts: Iterable[tuple[str, int]], n_chunks: int) -> list[str]:
    """Return what is wrong with the kernels of a call, given their names and numbers of launches."""
    counts = list(counts)
    found = [
        f"{name[:80]} ({count} launches): {meaning}"
        for name, count in counts
        for pattern, meaning in ALARMS.items()
        if re.search(pattern, name)
    ]
    kernels = sum(count for name, count in counts if not name.startswith(("Memcpy", "Memset")))
    if kernels > MAX_KERNELS_PER_CHUNK * n_chunks:
        found.append(f"{kernels} kernels for {n_chunks} chunks: more than {MAX_KERNELS_PER_CHUNK} per chunk")
    return found


def our_kernel_names() -> set[str]:
    """Return the names of the Triton kernels of this project."""
    import fused_distill_kernels as package

    modules = [
        import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)
    ]
    members = [value for module in modules for value in vars(module).values()]
    return {value.fn.__name__ for value in members if hasattr(value, "fn") and hasattr(value, "arg_names")}


@check("kernels of a call, by the profiler")
def kernels_of_a_call(setting: Setting) -> CheckResult:
    result = CheckResult()
    step = step_of(inputs_of(setting))
    step()
    setting.synchronize()
    on_gpu = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        setting.synchronize()
    events = [
        (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    events = sorted((event for event in events if event[2] > 0), key=lambda event: -event[2])
    total = sum(time for *_, time in events)
    ours = {name: count for name, count, _ in events if name in our_kernel_names()}
    result.rows.append({"ms": total / 1000, "launches": sum(count for _, count, _ in events)})
    result.rows += [
        {"kernel": name[:80], "launches": count, "ms": time / 1000, "share": time / total}
        for name, count, time in events[:25]
    ]
    if on_gpu:
        result.expect(bool(ours), "none of this project's Triton kernels ran")
        n_chunks = min(ours.values(), default=1)
        result.problems += alarms([(name, count) for name, count, _ in events], n_chunks)
    return result


@check("no wait for the GPU in a call without a mask", needs_cuda=True)
def synchronisations(setting: Setting) -> CheckResult:
    result = CheckResult()
    inputs = inputs_of(setting)
    mask = torch.arange(setting.tokens, device=setting.device) % 3 > 0
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("no mask", {}, 0),
        ("mixed KL", {"divergence": "mixed_kl"}, 0),
        ("mask", {"mask": mask}, 1),
    ]
    for name, options, allowed in calls:
        step = step_of(inputs, **options)
        step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [
            f"{warning.filename}:{warning.lineno}" for warning in seen if "synchroniz" in str(warning.message)
        ]
        result.rows.append({"call": name, "waits": len(waits), "at": "; ".join(waits)})
        result.expect(len(waits) <= allowed, f"{name}: {len(waits)} waits for the GPU, expected {allowed}")
    return result


@check("memory within workspace_bytes, and no allocation from step to step", needs_cuda=True)
def memory(setting: Setting) -> CheckResult:
    result = CheckResult()
    for workspace in (256 << 20, 1 << 30):
        for tokens in (setting.tokens, setting.tokens - 17):
            inputs = inputs_of(setting, tokens=tokens)
            step = step_of(inputs, workspace_bytes=workspace)
            step()
            for tensor in inputs:
                tensor.grad = None
            setting.synchronize()
            before = torch.cuda.memory_allocated(setting.device)
            allocations = _device_allocations(setting)
            torch.cuda.reset_peak_memory_stats(setting.device)
            loss = fused_linear_jsd(*inputs, workspace_bytes=workspace)
            forward_peak = torch.cuda.max_memory_allocated(setting.device) - before
            loss.backward()
            setting.synchronize()
            # Gradients are accumulated in float32 before they are returned in the parameters' dtype.
            gradients = 4 * (inputs[0].numel() + inputs[1].numel())
            used = forward_peak - gradients
            new = _device_allocations(setting) - allocations
            where = f"{tokens} tokens, workspace {workspace >> 20} MiB"
            result.rows.append(
                {"call": where, "used MiB": used / 2**20, "gradients MiB": gradients / 2**20, "new": new}
            )
            result.expect(
                used <= workspace + SLACK_BYTES, f"{where}: used {used / 2**20:.0f} MiB beside the gradients"
            )
            result.expect(new == 0, f"{where}: {new} allocations from the driver in a repeated call")
    return result


def _device_allocations(setting: Setting) -> int:
    return torch.cuda.memory_stats(setting.device).get("num_device_alloc", 0)


@check("odd vocabulary against a padded one")
def odd_vocabulary(setting: Setting) -> CheckResult:
    odd, even = setting.vocab + 1, setting.vocab + 64
    result = CheckResult()
    seconds = {vocab: setting.seconds(step_of(inputs_of(setting, vocab))) for vocab in (odd, even)}
    ratio = seconds[odd] / seconds[even]
    result.rows.append({"odd": odd, "padded": even, "odd ms": 1000 * seconds[odd], "ratio": ratio})
    if setting.device.type == "cuda" and not setting.small:
        limit = MAX_RATIO_FOR_ODD_VOCABULARY
        result.expect(
            ratio <= limit, f"V {odd} takes {ratio:.2f} times as long as V {even}, expected {limit}"
        )
    return result


@check("CUDA graph of a call without a mask", needs_cuda=True)
def cuda_graph(setting: Setting) -> CheckResult:
    inputs = inputs_of(setting)
    step = step_of(inputs)
    expected = step().item()
    stream = torch.cuda.Stream(setting.device)
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(setting.device).wait_stream(stream)
    for tensor in inputs:
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_linear_jsd(*inputs)
        loss.backward()
    graph.replay()
    setting.synchronize()
    result = CheckResult([{"eager": expected, "replayed": loss.item()}])
    result.expect(abs(loss.item() - expected) <= 1e-5 * abs(expected), "the replayed loss differs")
    return result


@check("second device, while the first is the current one", needs_cuda=True)
def second_device(setting: Setting) -> CheckResult:
    if torch.cuda.device_count() < 2:
        raise CheckSkipped("one device")
    other = torch.device("cuda", (setting.device.index or 0) ^ 1)
    inputs = inputs_of(setting)
    moved = [tensor.detach().to(other).requires_grad_(tensor.requires_grad) for tensor in inputs]
    losses = [step_of(tensors)() for tensors in (inputs, moved)]
    result = CheckResult([{"device": str(other), "loss": losses[1].item()}])
    result.expect(losses[1].device == other, f"the loss is on {losses[1].device}")
    for i in range(2):
        gradients = inputs[i].grad, moved[i].grad
        assert gradients[0] is not None
        assert gradients[1] is not None
        error = relative_error(gradients[1].to(setting.device), gradients[0])
        result.expect(error < 1e-3, f"gradient {i} differs by {error:.1e}")
    return result
