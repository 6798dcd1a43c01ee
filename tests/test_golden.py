"""Golden results of fixed inputs: bitwise equal on the kind of machine that recorded them, close elsewhere.

`python tests/test_golden.py` (and with TRITON_INTERPRET=1) records them again. Only a change that is meant to
change results may do so, and must say why.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, TOPK, Case
from fused_distill import topk_logprobs
from torch import Tensor

FILE = Path(__file__).with_name("golden.json")
NEW_DIVERGENCES: dict[str, dict[str, Any]] = {
    "skew-forward": {"divergence": "skew_forward_kl", "alpha": 0.1},
    "skew-reverse": {"divergence": "skew_reverse_kl", "alpha": 0.1},
    "mixed": {"divergence": "mixed_kl", "reverse_weight": 0.3},
    "total-variation": {"divergence": "total_variation"},
    "clipped-0.0": {"beta": 0.0, "entry_clip": 0.05},
    "clipped-1.0": {"beta": 1.0, "entry_clip": 0.05},
    "clipped-skew-reverse": {"divergence": "skew_reverse_kl", "alpha": 0.1, "entry_clip": 0.05},
}
TOKENS, VOCAB, WIDTH, TEACHER_WIDTH = (2, 3), 2100, 8, 6  # one tile of the kernels and a bit


def machine() -> str:
    """Describe what the last bit depends on: torch, the processor's vector instructions, the C++ compiler."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    words = [f"torch {torch.__version__}", platform.system(), platform.machine(), vendor, capability]
    if BACKEND == "cpp":
        version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
        words.append(version.splitlines()[0])
    return " ".join(words)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    teacher_hidden, teacher_weight = randn(*TOKENS, TEACHER_WIDTH), randn(VOCAB, TEACHER_WIDTH)
    return {
        "student_hidden": randn(*TOKENS, WIDTH),
        "student_weight": randn(VOCAB, WIDTH) / WIDTH**0.5,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "student_bias": randn(VOCAB),
        "teacher_bias": randn(VOCAB),
        "token_weight": randn(*TOKENS).abs(),
        "labels": torch.tensor([[5, -100, 2099], [7, 0, 1]]),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
    }


def cases() -> Iterator[tuple[str, Case]]:
    given = tensors()
    labels = given["labels"].clamp(max=2089)  # below vocab_size
    student = given["student_hidden"], given["student_weight"]
    support = topk_logprobs(given["teacher_hidden"], given["teacher_weight"], 5)
    full = Case((*student, given["teacher_hidden"], given["teacher_weight"]))
    keywords = {name: given[name] for name in ("student_bias", "token_weight", "mask")} | {"labels": labels}
    transform = {"temperature": 0.7, "student_logit_scale": 0.5, "student_softcap": 5.0}
    options: dict[str, Any] = {**transform, "hard_weight": 0.6, "soft_weight": 0.4, "vocab_size": 2090}
    teacher = {"teacher_logit_scale": 1.5, "teacher_softcap": 4.0}
    for beta in (0.0, 0.3, 0.5, 1.0):
        yield f"full-{beta}", full.with_options(beta=beta)
        rich = Case(full.tensors, {**keywords, "teacher_bias": given["teacher_bias"]}, {**options, **teacher})
        yield f"full-{beta}-options", rich.with_options(beta=beta, normalizer=17.0)
        yield f"full-{beta}-none", rich.with_options(beta=beta, reduction="none")
        yield f"full-{beta}-bfloat16", full.to(torch.bfloat16).with_options(beta=beta)
        for tail in ("bucket", "renormalize", "truncate"):
            sparse = Case((*student, support.logprobs, support.ids), {}, {"tail": tail, "beta": beta}, TOPK)
            yield f"{tail}-{beta}", sparse
            rich = Case(sparse.tensors, keywords, {**sparse.options, **options}, TOPK)
            yield f"{tail}-{beta}-options", rich.with_options(vocab_size=None)
            yield f"{tail}-{beta}-chunks", sparse.with_options(workspace_bytes=sparse.min_workspace())
    for name, divergence in NEW_DIVERGENCES.items():
        yield f"full-{name}", full.with_options(**divergence)
        rich = Case(full.tensors, {**keywords, "teacher_bias": given["teacher_bias"]}, {**options, **teacher})
        yield f"full-{name}-options", rich.with_options(**divergence, normalizer=17.0)
        for tail in ("bucket", "renormalize"):
            sparse = Case((*student, support.logprobs, support.ids), {}, {"tail": tail, **divergence}, TOPK)
            yield f"{tail}-{name}", sparse
    if BACKEND == "cpp":
        yield "full-0.3-float64", full.to(torch.float64).with_options(beta=0.3)


def results(case: Case) -> dict[str, Any]:
    """Return a digest of every bit, and each result's norm for machines that round differently."""
    result = case.run()
    columns = [c for c in (result.loss, *result.grads, *result.stats) if c is not None]
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return {"sha256": digest.hexdigest(), "norms": [c.double().norm().item() for c in columns]}


CASES = dict(cases())


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_results_equal_the_recorded_ones(name: str) -> None:
    recorded = json.loads(FILE.read_text())[BACKEND]
    expected, actual = recorded["results"][name], results(CASES[name])
    if recorded["machine"] == machine() and DEVICE.type == "cpu":
        assert actual["sha256"] == expected["sha256"]
    assert actual["norms"] == pytest.approx(
        expected["norms"], rel=1e-2 if "bfloat16" in name else 1e-5, abs=1e-7
    )


def record() -> None:
    torch.set_num_threads(1)
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    content[BACKEND] = {
        "machine": machine(),
        "results": {name: results(case) for name, case in CASES.items()},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
