"""What holds for every call, on the backend under test: "torch", or "triton" in the interpreter's process."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, HALF, INTERPRETED, Case, cases
from checks import (
    BETAS,
    assert_close,
    check_float32,
    check_float64,
    check_half,
    with_examples,
    with_few_examples,
)
from fused_distill import fused_linear_jsd
from fused_distill.chunked import loop as _engine
from fused_distill.chunked.workspace import ChunkPlan, plan_chunks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def call(case: Case, **options: object) -> Tensor:
    loss = fused_linear_jsd(
        *case.tensors, **case.per_token, **{**case.options, "backend": BACKEND, **options}
    )  # pyright: ignore[reportArgumentType]
    assert isinstance(loss, Tensor)
    return loss


@with_examples
@given(cases())
def test_float32_is_as_exact_as_three_times_the_float32_reference(case: Case) -> None:
    check_float32(case)


@with_examples
@given(cases())
def test_statistics_equal_the_oracle(case: Case) -> None:
    got, want = case.answer(BACKEND).stats, case.oracle().stats
    for mine, true in zip(got[:4], want[:4], strict=True):
        assert_close(mine, true, 1e-5, 1e-5)
    assert got.top1_agreement.dtype == torch.bool
    assert (got.top1_agreement == want.top1_agreement).double().mean() > 0.9  # near ties may fall either way


@with_few_examples
@given(cases(dtypes=HALF))
def test_half_inputs_are_rounded_once_at_the_end(case: Case) -> None:
    check_half(case)


@pytest.mark.skipif(INTERPRETED, reason="the kernels compute in float32")
@with_few_examples
@given(cases(dtypes=(torch.float64,)))
def test_float64_inputs_are_computed_in_float64(case: Case) -> None:
    check_float64(case)


@with_few_examples
@given(cases())
def test_the_divergence_is_never_negative(case: Case) -> None:
    case = Case(case.tensors, {k: t for k, t in case.per_token.items() if k != "labels"}, case.options)
    per_token = case.with_options(hard_weight=0.0, reduction="none", normalizer=None)
    assert (call(per_token) >= 0).all()


@with_few_examples
@given(cases(dtypes=(torch.float32, *HALF)), st.sampled_from(BETAS))
def test_identical_models_give_exactly_nothing(case: Case, beta: float) -> None:
    hs, ws, *_ = case.tensors
    options = {
        "beta": beta,
        "temperature": case.options["temperature"],
        "reduction": case.options["reduction"],
        "student_softcap": case.options["student_softcap"],
        "teacher_softcap": case.options["student_softcap"],
    }
    bias = case.per_token.get("student_bias")
    per_token = {} if bias is None else {"student_bias": bias, "teacher_bias": bias}
    got = Case((hs, ws, hs, ws), per_token, options).answer(BACKEND)
    assert (got.loss == 0).all()
    assert all(g is not None and (g == 0).all() for g in got.grads)


@with_few_examples
@given(cases())
def test_chunking_changes_nothing_but_rounding(case: Case) -> None:
    whole = case.with_options(workspace_bytes=1 << 30).answer(BACKEND)
    parts = case.with_options(workspace_bytes=case.least_workspace()).answer(BACKEND)
    for a, b in zip((whole.loss, *whole.grads), (parts.loss, *parts.grads), strict=True):
        assert_close(a, b, 1e-5)


def test_the_least_workspace_takes_one_token_at_a_time() -> None:
    # Guards the tests above: they see many chunks only while this holds.
    case = Case((torch.randn(7, 8), torch.randn(50, 8), torch.randn(7, 6), torch.randn(50, 6)))
    plans: list[ChunkPlan] = []

    def spy(*args: Any, **options: Any) -> ChunkPlan:
        plans.append(plan_chunks(*args, **options))
        return plans[-1]

    least = case.least_workspace()
    with mock.patch.object(_engine, "plan_chunks", spy):
        case.with_options(workspace_bytes=least).answer(BACKEND)
    assert [len(list(plan.chunks())) for plan in plans] == [7]


@with_few_examples
@given(cases())
def test_a_split_batch_with_one_normalizer_sums_to_the_whole(case: Case) -> None:
    hs, ws, ht, wt = case.tensors
    flat = {k: t if k.endswith("bias") else t.flatten() for k, t in case.per_token.items()}
    hs, ht = hs.flatten(0, -2), ht.flatten(0, -2)
    options = {**case.options, "reduction": "mean", "normalizer": torch.tensor(5.0)}
    half = len(hs) // 2

    def part(rows: slice) -> Tensor:
        per_token = {k: t if k.endswith("bias") else t[rows] for k, t in flat.items()}
        return call(Case((hs[rows], ws, ht[rows], wt), per_token, options))

    assert_close(part(slice(0, half)) + part(slice(half, None)), part(slice(None)), 1e-5)


@with_few_examples
@given(cases())
def test_masked_tokens_may_hold_nan(case: Case) -> None:
    hs, ws, ht, wt = (t.clone() for t in case.tensors)
    mask = torch.arange(hs[..., 0].numel()).reshape(hs.shape[:-1]) % 2 == 0
    clean = Case((hs, ws, ht, wt), {**case.per_token, "mask": mask}, case.options).answer(BACKEND)
    hs[~mask], ht[~mask] = math.nan, math.nan
    dirty = Case((hs, ws, ht, wt), {**case.per_token, "mask": mask}, case.options).answer(BACKEND)
    assert torch.equal(clean.loss, dirty.loss)
    for a, b in zip(clean.grads, dirty.grads, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@with_few_examples
@given(cases())
def test_masking_equals_leaving_out(case: Case) -> None:
    hs, ws, ht, wt = case.tensors
    mask = torch.arange(hs[..., 0].numel()).reshape(hs.shape[:-1]) % 3 != 1
    kept = {k: t if k.endswith("bias") else t[mask] for k, t in case.per_token.items() if k != "mask"}
    masked = call(
        Case(
            case.tensors,
            {**case.per_token, "mask": mask},
            {**case.options, "reduction": "sum", "normalizer": None},
        )
    )
    packed = call(
        Case((hs[mask], ws, ht[mask], wt), kept, {**case.options, "reduction": "sum", "normalizer": None})
    )
    assert_close(masked, packed, 1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("how", ["empty", "masked"])
def test_no_token_at_all_gives_zero_and_zero_gradients(beta: float, how: str) -> None:
    n = 0 if how == "empty" else 3
    tensors = (torch.randn(n, 4), torch.randn(9, 4), torch.randn(n, 5), torch.randn(9, 5))
    mask = torch.zeros(n, dtype=torch.bool)
    got = Case(tensors, {"mask": mask} if how == "masked" else {}, {"beta": beta}).answer(BACKEND)
    assert got.loss == 0
    assert all(g is not None and (g == 0).all() for g in got.grads)


@with_few_examples
@given(cases())
def test_order_of_the_vocabulary_does_not_matter(case: Case) -> None:
    hs, ws, ht, wt = case.tensors
    vocab = min(len(ws), len(wt))
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    options = {"beta": case.options["beta"], "temperature": case.options["temperature"]}
    plain = call(Case((hs, ws[:vocab], ht, wt[:vocab]), {}, options))
    assert_close(call(Case((hs, ws[order], ht, wt[order]), {}, options)), plain, 1e-5)


@with_few_examples
@given(cases())
def test_order_of_the_tokens_does_not_matter(case: Case) -> None:
    hs, ws, ht, wt = case.tensors
    flat = {k: t if k.endswith("bias") else t.flatten() for k, t in case.per_token.items()}
    hs, ht = hs.flatten(0, -2), ht.flatten(0, -2)
    order = torch.randperm(len(hs), generator=torch.Generator().manual_seed(0))
    mixed = {k: t if k.endswith("bias") else t[order] for k, t in flat.items()}
    options = {**case.options, "reduction": "none", "normalizer": None}
    plain = call(Case((hs, ws, ht, wt), flat, options))
    assert_close(call(Case((hs[order], ws, ht[order], wt), mixed, options)), plain[order], 1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_constant_added_to_all_logits_does_not_matter(beta: float) -> None:
    tensors = (torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 8), torch.randn(50, 8))
    plain = call(Case(tensors, {}, {"beta": beta}))
    moved = call(Case(tensors, {"student_bias": torch.full((50,), 64.0)}, {"beta": beta}))
    assert_close(moved, plain, 1e-4)


def logits_case(student: Tensor, teacher: Tensor, beta: float) -> Case:
    """A case whose logits are exactly these: an identity head."""
    head = torch.eye(student.shape[1])
    return Case((student, head, teacher, head), {}, {"beta": beta})


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1e4, 1e3, 100.0])
def test_logits_of_any_size_equal_the_oracle(beta: float, size: float) -> None:
    student = torch.tensor([[size, -size, 0.0, 1.0], [-size, -size, size, size], [0.0, size, 1.0, -size]])
    teacher = torch.tensor([[-size, size, 0.0, 1.0], [-size, -size, size, size - 1], [0.0, size, 2.0, -size]])
    got, want = (
        logits_case(student, teacher, beta).answer(BACKEND),
        logits_case(student, teacher, beta).oracle(),
    )
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_both_models_forbid_do_not_count(beta: float) -> None:
    hs, ws, ht, wt = torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 6), torch.randn(50, 6)
    forbidden = torch.zeros(50)
    forbidden[::3] = -math.inf
    allowed = forbidden == 0
    biases = {"student_bias": forbidden, "teacher_bias": forbidden}
    got = Case((hs, ws, ht, wt), biases, {"beta": beta}).answer(BACKEND)
    want = Case((hs, ws[allowed], ht, wt[allowed]), {}, {"beta": beta}).answer(BACKEND)
    assert_close(got.loss, want.loss, 1e-6)
    assert_close(got.grads[0], want.grads[0], 1e-5)
    for mine, true in zip(got.stats[:4], want.stats[:4], strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9])
def test_tokens_that_the_teacher_alone_forbids_equal_the_oracle(beta: float) -> None:
    bias = torch.zeros(50)
    bias[::3] = -math.inf
    case = Case(
        (torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 6), torch.randn(50, 6)),
        {"teacher_bias": bias},
        {"beta": beta},
    )
    got, want = case.answer(BACKEND), case.oracle()
    assert got.loss.isfinite()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
def test_tokens_that_the_student_alone_forbids_equal_very_unlikely_ones(beta: float) -> None:
    # Not beta 0, whose loss is infinite there.
    tensors = (torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 6), torch.randn(50, 6))
    forbidden, unlikely = torch.zeros(50), torch.zeros(50)
    forbidden[::3], unlikely[::3] = -math.inf, -1e4
    got = Case(tensors, {"student_bias": forbidden}, {"beta": beta}).answer(BACKEND)
    want = Case(tensors, {"student_bias": unlikely}, {"beta": beta}).answer(BACKEND)
    assert got.loss.isfinite()
    for mine, other in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, other, 1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_models_with_nothing_in_common_reach_the_largest_divergence(beta: float) -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert call(logits_case(student, teacher, beta)).item() == pytest.approx(entropy, rel=1e-6)


def test_entropies_of_uniform_models_are_log_v() -> None:
    stats = logits_case(torch.zeros(2, 64), torch.ones(2, 64), 0.5).answer(BACKEND).stats
    for entropy in (stats.student_entropy, stats.teacher_entropy):
        assert entropy.tolist() == pytest.approx([math.log(64)] * 2, rel=1e-6)
    assert stats.top1_agreement.all()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)),
        (1.0, 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)),
        (0.5, 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
    ],
)
def test_two_tokens_with_known_probabilities(beta: float, expected: float) -> None:
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    assert call(logits_case(student, teacher, beta)).item() == pytest.approx(expected, rel=1e-6)


def test_one_hot_teacher_against_a_uniform_student_is_log_v() -> None:
    teacher = torch.full((1, 64), -1e4)
    teacher[0, 5] = 0.0
    assert call(logits_case(torch.zeros(1, 64), teacher, 0.0)).item() == pytest.approx(math.log(64), rel=1e-6)


def test_frozen_weight_gets_no_gradient_and_the_hidden_gradient_is_the_same() -> None:
    hs, ws, ht, wt = torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 6), torch.randn(50, 6)
    trained = Case((hs, ws, ht, wt)).answer(BACKEND).grads[0]
    hs.requires_grad_()
    fused_linear_jsd(hs, ws, ht, wt, backend=BACKEND).backward()
    assert ws.grad is None
    assert hs.grad is not None
    assert trained is not None
    assert torch.equal(hs.grad, trained)


def test_strided_inputs_equal_contiguous_ones() -> None:
    tensors = (
        torch.randn(8, 6).T,
        torch.randn(8, 50).T,
        torch.randn(6, 12)[:, ::2],
        torch.randn(100, 6)[::2],
    )
    hs, ws, ht, wt = (t.contiguous() for t in tensors)
    got, want = Case(tensors).answer(BACKEND), Case((hs, ws, ht, wt)).answer(BACKEND)
    for a, b in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("index", [0, 2])
def test_nan_is_not_hidden(beta: float, index: int) -> None:
    tensors = [torch.randn(5, 8), torch.randn(50, 8), torch.randn(5, 6), torch.randn(50, 6)]
    tensors[index][0, 0] = math.nan
    hs, ws, ht, wt = tensors
    got = Case((hs, ws, ht, wt), {}, {"beta": beta}).answer(BACKEND)
    assert got.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in got.grads)
