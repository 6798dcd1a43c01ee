"""Invalid arguments of `fused_linear_jsd` and its module get an error that names them, before any work."""

# Type checkers would find most of these errors too.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from cases import INTERPRETED
from fused_distill import FusedLinearJSDLoss, fused_linear_jsd
from fused_distill.config import Backend, Reduction

N, V, DS, DT = 3, 7, 4, 5


def valid() -> dict[str, Any]:
    return {
        "student_hidden": torch.randn(N, DS),
        "student_weight": torch.randn(V, DS),
        "teacher_hidden": torch.randn(N, DT),
        "teacher_weight": torch.randn(V, DT),
    }


INVALID = [
    ("student_hidden", ValueError, {"student_hidden": torch.randn(N, DS + 1)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N, DT + 1)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N + 1, DT)}),
    ("student_hidden", TypeError, {"student_hidden": torch.ones(N, DS, dtype=torch.int64)}),
    ("student_hidden", TypeError, {"student_hidden": [[1.0]]}),
    ("student_hidden", ValueError, {"student_hidden": torch.tensor(1.0)}),
    ("teacher_weight", TypeError, {"teacher_weight": torch.ones(V, DT, dtype=torch.bool)}),
    ("student_weight", ValueError, {"student_weight": torch.randn(V, DS, 1)}),
    ("student_weight", ValueError, {"student_weight": torch.randn(0, DS)}),
    ("student_hidden", ValueError, {"student_hidden": torch.ones(N, 0), "student_weight": torch.ones(V, 0)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.ones(N, 0), "teacher_weight": torch.ones(V, 0)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N, DT, device="meta")}),
    ("student_weight", TypeError, {"student_weight": None}),
    ("teacher_hidden", TypeError, {"teacher_hidden": None}),
    ("teacher_weight", TypeError, {"teacher_weight": None}),
    ("student_bias", ValueError, {"student_bias": torch.randn(V + 1)}),
    ("teacher_bias", ValueError, {"teacher_bias": torch.randn(1, V)}),
    ("mask", ValueError, {"mask": torch.ones(N + 1, dtype=torch.bool)}),
    ("mask", TypeError, {"mask": torch.ones(N)}),
    ("mask", TypeError, {"mask": [True] * N}),
    ("token_weight", ValueError, {"token_weight": torch.ones(N, 1)}),
    ("token_weight", TypeError, {"token_weight": torch.ones(N, dtype=torch.int64)}),
    ("labels", ValueError, {"hard_weight": 0.5}),
    ("labels", TypeError, {"labels": torch.ones(N), "hard_weight": 0.5}),
    ("labels", ValueError, {"labels": torch.full((N,), V), "hard_weight": 0.5}),
    ("labels", ValueError, {"labels": torch.full((N,), -1), "hard_weight": 0.5}),
    ("labels", ValueError, {"labels": torch.ones(N + 1, dtype=torch.int64)}),
    ("beta", ValueError, {"beta": 1.5}),
    ("beta", ValueError, {"beta": -0.1}),
    ("beta", ValueError, {"beta": float("nan")}),
    ("beta", TypeError, {"beta": "0.5"}),
    ("temperature", ValueError, {"temperature": 0.0}),
    ("temperature", ValueError, {"temperature": -1.0}),
    ("student_logit_scale", ValueError, {"student_logit_scale": 0.0}),
    ("teacher_logit_scale", ValueError, {"teacher_logit_scale": float("inf")}),
    ("student_softcap", ValueError, {"student_softcap": 0.0}),
    ("teacher_softcap", TypeError, {"teacher_softcap": "30"}),
    ("hard_weight", ValueError, {"hard_weight": -1.0}),
    ("soft_weight", TypeError, {"soft_weight": None}),
    ("vocab_size", ValueError, {"vocab_size": V + 1}),
    ("vocab_size", ValueError, {"vocab_size": 0}),
    ("vocab_size", TypeError, {"vocab_size": 3.0}),
    ("vocab_size", TypeError, {"vocab_size": np.float32(3.0)}),
    ("surplus", ValueError, {"surplus": "tail"}),
    ("reduction", ValueError, {"reduction": "batchmean"}),
    ("normalizer", ValueError, {"normalizer": 0.0}),
    ("normalizer", TypeError, {"normalizer": torch.tensor(1j)}),
    ("normalizer", ValueError, {"normalizer": torch.ones(2)}),
    ("normalizer", ValueError, {"normalizer": torch.tensor(-3)}),
    ("normalizer", ValueError, {"normalizer": torch.tensor(0)}),
    ("normalizer", ValueError, {"normalizer": torch.tensor(0), "mask": torch.tensor([True, False, False])}),
    ("normalizer", ValueError, {"normalizer": torch.tensor(torch.nan)}),
    ("normalizer", ValueError, {"normalizer": 3.0, "reduction": "sum"}),
    ("workspace_bytes", ValueError, {"workspace_bytes": 1}),
    ("workspace_bytes", TypeError, {"workspace_bytes": 1e9}),
    ("backend", ValueError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(
    ("name", "error", "change"), INVALID, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(INVALID)]
)
def test_invalid_argument_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=name):
        fused_linear_jsd(**{**valid(), **change})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_backend_refuses_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="CUDA or ROCm"):
        fused_linear_jsd(**valid(), backend="triton")


@pytest.mark.parametrize(("options", "error"), [({"beta": 2.0}, ValueError), ({"betta": 0.5}, TypeError)])
def test_module_checks_its_options_at_construction(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        FusedLinearJSDLoss(**options)


def test_module_shows_its_options() -> None:
    assert repr(FusedLinearJSDLoss(beta=0.25)) == "FusedLinearJSDLoss(beta=0.25)"


OPTIONAL = {
    "mask": torch.ones(N, dtype=torch.bool),
    "student_bias": torch.zeros(V),
    "teacher_bias": torch.zeros(V),
    "token_weight": torch.ones(N),
    "labels": torch.zeros(N, dtype=torch.int64),
}


@pytest.mark.parametrize("name", ["student_weight", "teacher_hidden", "teacher_weight", *OPTIONAL])
def test_tensor_on_another_device_is_named(name: str) -> None:
    tensors = {**valid(), **OPTIONAL}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(
        ValueError, match=f"^{name} must be on the device of the hidden states, cpu, got meta"
    ):
        fused_linear_jsd(**tensors, hard_weight=0.5)


@pytest.mark.parametrize("name", ["student_weight", "teacher_hidden", "teacher_weight", *OPTIONAL])
def test_list_in_place_of_a_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list"):
        fused_linear_jsd(**{**valid(), **OPTIONAL, name: [0.0]}, hard_weight=0.5)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    [
        *("beta", "temperature", "student_logit_scale", "teacher_logit_scale", "student_softcap"),
        *("teacher_softcap", "hard_weight", "soft_weight", "normalizer"),
    ],
)
def test_number_that_is_not_finite_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        fused_linear_jsd(**{**valid(), name: value})


@pytest.mark.parametrize("value", ["1", True, [1.0]])
@pytest.mark.parametrize("name", ["beta", "temperature", "student_softcap", "soft_weight", "normalizer"])
def test_option_that_is_not_a_number_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        fused_linear_jsd(**{**valid(), name: value})


@pytest.mark.parametrize("name", ["reduction", "backend"])
@pytest.mark.parametrize("value", [None, "", "MEAN", 3])
def test_unknown_choice_is_named_with_the_known_ones(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of '"):
        fused_linear_jsd(**{**valid(), name: value})


def test_the_name_of_a_plain_kl_is_answered_by_how_to_get_it() -> None:
    with pytest.raises(
        ValueError, match=r"^divergence must be .*'jsd'.* with beta 0 and 1\), got 'reverse_kl'"
    ):
        fused_linear_jsd(**{**valid(), "divergence": "reverse_kl"})


@pytest.mark.parametrize("smaller", ["student_weight", "teacher_weight"])
def test_vocab_size_may_be_as_large_as_the_smaller_head_and_no_larger(smaller: str) -> None:
    tensors = valid()
    tensors[smaller] = tensors[smaller][: V - 2]
    assert fused_linear_jsd(**tensors, vocab_size=V - 2) == fused_linear_jsd(**tensors)
    with pytest.raises(ValueError, match=r"^vocab_size must not exceed the rows of a head, got 6"):
        fused_linear_jsd(**tensors, vocab_size=V - 1)


def test_label_beyond_vocab_size_is_refused_although_the_head_has_it() -> None:
    labels = torch.full((N,), 5)
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 5\) or -100, got 5"):
        fused_linear_jsd(**valid(), labels=labels, hard_weight=1.0, vocab_size=5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_invalid_argument_is_named_on_every_backend(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"^beta must be between"):
        fused_linear_jsd(**valid(), beta=2.0, backend=backend)
    with pytest.raises(TypeError, match=r"^mask must be bool"):
        fused_linear_jsd(**valid(), mask=torch.ones(N), backend=backend)


def test_integers_equal_floats_and_int32_labels_equal_int64_ones() -> None:
    tensors, labels = valid(), torch.tensor([1, -100, 6])
    options: dict[str, Any] = {"hard_weight": 1, "beta": 1, "temperature": 2, "normalizer": 3}
    floats: dict[str, Any] = {name: float(value) for name, value in options.items()}
    assert fused_linear_jsd(**tensors, labels=labels.int(), **options) == fused_linear_jsd(
        **tensors, labels=labels, **floats
    )


@pytest.mark.parametrize("number", [np.int64, np.int32, np.float32, np.float64, np.float16])
def test_numpy_numbers_equal_pythons(number: Any) -> None:
    tensors, labels = valid(), torch.tensor([1, -100, 6])
    names = ("beta", "temperature", "student_logit_scale", "teacher_softcap", "hard_weight", "normalizer")
    actual, expected = (
        fused_linear_jsd(**tensors, labels=labels, **{name: cast(1) for name in names})
        for cast in (number, float)
    )
    assert torch.equal(actual, expected)


def test_numpy_integers_equal_pythons() -> None:
    tensors = valid()
    actual = fused_linear_jsd(**tensors, vocab_size=np.int64(5), workspace_bytes=np.int32(1 << 20))
    assert torch.equal(actual, fused_linear_jsd(**tensors, vocab_size=5, workspace_bytes=1 << 20))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_labels_of_masked_tokens_are_ignored(backend: Backend) -> None:
    tensors, mask = valid(), torch.tensor([True, False, False])
    losses = [
        fused_linear_jsd(
            **tensors, mask=mask, labels=torch.tensor([1, *free]), hard_weight=0.5, backend=backend
        )
        for free in ([2, 3], [V, -1])
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["student_weight", "teacher_weight", "student_bias"])
def test_head_that_zero_3_has_partitioned_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is empty.*DeepSpeed ZeRO-3.*GatheredParameters"):
        fused_linear_jsd(**{**valid(), name: torch.empty(0)})


@pytest.mark.parametrize("option", ["mask", "normalizer", "student_bias", "labels"])
def test_module_refuses_tensors_at_construction(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        FusedLinearJSDLoss(**options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_passes_every_argument_on(reduction: Reduction) -> None:
    tensors = {**valid(), **OPTIONAL, "mask": torch.tensor([True, False, True])}
    options: dict[str, Any] = {"reduction": reduction, "hard_weight": 0.3, "student_softcap": 5.0}
    normalizer = 7.0 if reduction == "mean" else None
    actual, stats = FusedLinearJSDLoss(return_stats=True, **options)(**tensors, normalizer=normalizer)
    expected, expected_stats = fused_linear_jsd(
        **tensors, normalizer=normalizer, return_stats=True, **options
    )
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats[:5], expected_stats[:5], strict=True))


def test_import_loads_neither_triton_nor_transformers() -> None:
    # torch itself may import Triton, so only modules that fused_distill adds count.
    code = """
import sys, torch
before = set(sys.modules)
import fused_distill
added = {name.split(".")[0] for name in set(sys.modules) - before}
unexpected = added & {"triton", "transformers", "fused_distill_kernels", "fastapi"}
assert not unexpected, unexpected
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
