"""Bad input gets one clear error that names the argument, before any work."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import FusedLinearJSDLoss, fused_linear_jsd, reference

N, V, DS, DT = 3, 7, 4, 5


def good() -> dict[str, Any]:
    return {
        "student_hidden": torch.randn(N, DS),
        "student_weight": torch.randn(V, DS),
        "teacher_hidden": torch.randn(N, DT),
        "teacher_weight": torch.randn(V, DT),
    }


BAD = [
    ("student_hidden", ValueError, {"student_hidden": torch.randn(N, DS + 1)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N, DT + 1)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N + 1, DT)}),
    ("student_hidden", TypeError, {"student_hidden": torch.ones(N, DS, dtype=torch.int64)}),
    ("student_hidden", TypeError, {"student_hidden": [[1.0]]}),
    ("student_hidden", ValueError, {"student_hidden": torch.tensor(1.0)}),
    ("teacher_weight", TypeError, {"teacher_weight": torch.ones(V, DT, dtype=torch.bool)}),
    ("student_weight", ValueError, {"student_weight": torch.randn(V, DS, 1)}),
    ("student_weight", ValueError, {"student_weight": torch.randn(0, DS)}),
    ("teacher_hidden", ValueError, {"teacher_hidden": torch.randn(N, DT, device="meta")}),
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
    ("reduction", ValueError, {"reduction": "batchmean"}),
    ("normalizer", ValueError, {"normalizer": 0.0}),
    ("normalizer", ValueError, {"normalizer": torch.ones(2)}),
    ("normalizer", ValueError, {"normalizer": 3.0, "reduction": "sum"}),
    ("workspace_bytes", ValueError, {"workspace_bytes": 1}),
    ("workspace_bytes", TypeError, {"workspace_bytes": 1e9}),
    ("backend", ValueError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(("name", "error", "change"), BAD, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BAD)])
def test_a_bad_argument_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=name):
        fused_linear_jsd(**{**good(), **change})


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="CUDA or ROCm"):
        fused_linear_jsd(**good(), backend="triton")


def test_reference_has_the_same_signature() -> None:
    fused, plain = (inspect.signature(f).parameters for f in (fused_linear_jsd, reference.linear_jsd))
    assert list(fused) == list(plain)
    assert {k: p.default for k, p in fused.items() if k != "backend"} == {
        k: p.default for k, p in plain.items() if k != "backend"
    }


def test_module_gives_what_the_function_gives() -> None:
    tensors = good()
    module = FusedLinearJSDLoss(beta=0.3, temperature=2.0)
    assert torch.equal(module(**tensors), fused_linear_jsd(**tensors, beta=0.3, temperature=2.0))


@pytest.mark.parametrize(("options", "error"), [({"beta": 2.0}, ValueError), ({"betta": 0.5}, TypeError)])
def test_module_checks_its_options_at_construction(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        FusedLinearJSDLoss(**options)


def test_module_shows_its_options() -> None:
    assert repr(FusedLinearJSDLoss(beta=0.25)) == "FusedLinearJSDLoss(beta=0.25)"
