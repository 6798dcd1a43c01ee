"""`topk_logprobs` equals log_softmax of all logits, and gives supports for `fused_linear_topk_jsd`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import DEVICE, INTERPRETED
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from fused_distill.chunked.lm_head import LMHead
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((2, 7, 8), (50, 8)))
    return hidden.to(dtype), weight.to(dtype)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.3, "softcap": 5.0, "temperature": 2.0},
    {"bias": torch.linspace(-3, 3, 50)},
    {"vocab_size": 33, "bias": torch.linspace(-3, 3, 50)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("workspace_bytes", [None, 8000])
def test_logprobs_equal_log_softmax(
    options: dict[str, Any], dtype: torch.dtype, workspace_bytes: int | None
) -> None:
    hidden, weight = inputs(dtype)
    ids = torch.randint(33, (2, 7, 4))
    converted_options: dict[str, Any] = {
        k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()
    }
    result = topk_logprobs(hidden, weight, 5, ids, workspace_bytes=workspace_bytes, **converted_options)

    logits = hidden.double() @ weight.double().T + converted_options.get("bias", torch.zeros(50)).double()
    logits = logits[..., : options.get("vocab_size", 50)] * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    expected = torch.log_softmax(logits / options.get("temperature", 1.0), -1)
    assert result.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.logprobs.double(), expected.topk(5).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        result.logprobs.double(), expected.gather(-1, result.ids), rtol=1e-6, atol=1e-6
    )
    assert result.actual_logprobs is not None
    torch.testing.assert_close(
        result.actual_logprobs.double(), expected.gather(-1, ids), rtol=1e-6, atol=1e-6
    )


def test_one_actual_token_per_position_gives_the_shape_of_the_tokens() -> None:
    hidden, weight = inputs()
    ids = torch.randint(50, (2, 7))
    result = topk_logprobs(hidden, weight, 0, ids)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert result.logprobs.shape == (2, 7, 0)
    torch.testing.assert_close(result.actual_logprobs, expected)


def test_head_is_projected_in_autocasts_dtype() -> None:
    spy = mock.patch.object(LMHead, "for_inputs", wraps=LMHead.for_inputs)
    with spy as head, torch.autocast(DEVICE.type, torch.bfloat16):
        topk_logprobs(*inputs(), 3)
    assert head.call_args.args[-1] == torch.bfloat16


def test_actual_logprobs_are_none_without_actual_ids() -> None:
    assert topk_logprobs(*inputs(), 3).actual_logprobs is None


def test_masked_positions_give_absent_entries() -> None:
    hidden, weight = inputs()
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    ids = torch.full((2, 7), -1).masked_fill(mask, 3)
    plain = topk_logprobs(hidden, weight, 3, ids.clamp_min(0))
    hidden[~mask] = torch.nan
    result = topk_logprobs(hidden, weight, 3, ids, mask=mask)
    torch.testing.assert_close(result.logprobs[mask], plain.logprobs[mask])
    assert (result.logprobs[~mask] == -torch.inf).all()
    assert result.actual_logprobs is not None
    assert (result.actual_logprobs[~mask] == -torch.inf).all()


def test_no_token_gives_empty_results() -> None:
    result = topk_logprobs(torch.randn(0, 8), torch.randn(50, 8), 3)
    assert result.logprobs.shape == result.ids.shape == (0, 3)


def test_logprob_of_a_nearly_certain_token_keeps_its_digits() -> None:
    # log p of the likely token is -1.4e-6: a float32 log-sum-exp of size 30 would give 0 or -2e-6.
    hidden = torch.tensor([[30.0, 16.5]])
    result = topk_logprobs(hidden, torch.eye(2), 1).logprobs.item()
    expected = torch.log_softmax(hidden.double(), -1)[0, 0].item()
    assert result == pytest.approx(expected, rel=1e-5)


INVALID = [
    ("k", ValueError, {"k": 51}),
    ("k", ValueError, {"k": -1}),
    ("k", TypeError, {"k": 2.0}),
    ("k", TypeError, {"k": True}),
    ("hidden", ValueError, {"hidden": torch.ones(2, 7, 0), "weight": torch.ones(50, 0)}),
    ("weight", ValueError, {"weight": torch.empty(0)}),
    ("hidden", ValueError, {"hidden": torch.randn(2, 7, 9)}),
    ("hidden", TypeError, {"hidden": torch.ones(2, 7, 8, dtype=torch.int64)}),
    ("weight", ValueError, {"weight": torch.randn(50, 8, 1)}),
    ("bias", ValueError, {"bias": torch.randn(49)}),
    ("mask", TypeError, {"mask": torch.ones(2, 7)}),
    ("temperature", ValueError, {"temperature": 0.0}),
    ("logit_scale", ValueError, {"logit_scale": -1.0}),
    ("softcap", ValueError, {"softcap": 0.0}),
    ("vocab_size", ValueError, {"vocab_size": 51}),
    ("workspace_bytes", ValueError, {"workspace_bytes": 1}),
    ("actual_ids", ValueError, {"actual_ids": torch.full((2, 7), 50)}),
    ("actual_ids", ValueError, {"actual_ids": torch.zeros(2, 6, dtype=torch.int64)}),
    ("actual_ids", TypeError, {"actual_ids": torch.zeros(2, 7)}),
]


@pytest.mark.parametrize(
    ("name", "error", "change"), INVALID, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(INVALID)]
)
def test_invalid_argument_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    hidden, weight = inputs()
    arguments: dict[str, Any] = {"hidden": hidden, "weight": weight, "k": 3, **change}
    with pytest.raises(error, match=f"^{name} "):
        topk_logprobs(**arguments)


def test_numpy_numbers_equal_pythons() -> None:
    numbers = {"temperature": 2, "logit_scale": 3, "softcap": 5, "vocab_size": 40, "workspace_bytes": 1 << 20}
    actual = topk_logprobs(*inputs(), np.int64(3), **{name: np.int64(v) for name, v in numbers.items()})  # pyright: ignore[reportArgumentType]
    expected = topk_logprobs(*inputs(), 3, **numbers)  # pyright: ignore[reportArgumentType]
    assert torch.equal(actual.logprobs, expected.logprobs)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_loss_of_both_supports_lies_between_that_of_either_and_the_full_loss(
    seed: int, k: int, beta: float
) -> None:
    # Data processing inequality: merging outcomes loses information.
    hs, ws = inputs(seed=seed)
    ht, wt = inputs(seed=seed + 1)
    student_ids, teacher_ids = topk_logprobs(hs, ws, k).ids, topk_logprobs(ht, wt, k).ids

    def bucket(ids: Tensor) -> Tensor:
        logprobs = topk_logprobs(ht, wt, 0, ids).actual_logprobs
        assert logprobs is not None
        return fused_linear_topk_jsd(hs, ws, logprobs, ids, beta=beta, reduction="none")

    union = bucket(torch.cat([student_ids, teacher_ids], -1))
    slack = 1e-5 * union + 1e-6
    assert (union >= bucket(student_ids) - slack).all()
    assert (union >= bucket(teacher_ids) - slack).all()
    assert (union <= fused_linear_jsd(hs, ws, ht, wt, beta=beta, reduction="none") + slack).all()


def test_example_of_the_students_support_shows_its_smaller_error() -> None:
    script = Path(__file__).parent.parent / "examples" / "students_support.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    errors = {line[:18].strip(): float(line.split()[-1]) for line in done.stdout.splitlines()[1:4]}
    assert errors["union of both"] < errors["student's top k"] < 0.5 * errors["teacher's top k"]


def test_students_support_gives_the_reverse_kl_that_the_teachers_misses() -> None:
    # The student is sure of a token that is unlikely for the teacher. The token is in the student's support,
    # and in the tail of the teacher's.
    student = torch.full((1, 100), 0.0)
    student[0, 7] = 12.0
    teacher = torch.linspace(4, 0, 100).unsqueeze(0)
    teacher[0, 7] = -8.0
    head = torch.eye(100)
    full = fused_linear_jsd(student, head, teacher, head, beta=1.0)

    def support(ids: Tensor) -> Tensor:
        logprobs = topk_logprobs(teacher, head, 0, ids).actual_logprobs
        assert logprobs is not None
        return fused_linear_topk_jsd(student, head, logprobs, ids, beta=1.0)

    assert support(topk_logprobs(student, head, 2).ids) > 0.99 * full
    assert support(topk_logprobs(teacher, head, 2).ids) < 0.1 * full
