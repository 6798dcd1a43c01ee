"""Properties of `fused_linear_jsd` on the backend under test, "torch" or "triton"."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, DEVICE, HALF, Case, cases, strided
from checks import (
    assert_close,
    assert_results_close,
    assert_results_equal,
    assert_stats_close,
    assert_zero,
    check_float32,
    check_float64,
    check_half,
    finite_where_forbidden,
    for_each_divergence,
    some_divergence,
    with_examples,
    with_few_examples,
)
from fused_distill import fused_linear_jsd
from fused_distill.chunked import memory as chunked_memory
from fused_distill.chunked.workspace import ChunkPlan, plan_chunks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def random_case(n: int = 5, vocab: int = 50, **options: Any) -> Case:
    return Case(
        (torch.randn(n, 8), torch.randn(vocab, 8), torch.randn(n, 6), torch.randn(vocab, 6)), {}, options
    )


def with_tensors(case: Case, **tensors: Tensor) -> Case:
    """Return the case with more keywords that are tensors."""
    return replace(case, keyword_tensors={**case.keyword_tensors, **tensors})


def flattened(case: Case) -> Case:
    """Return the case with one token dimension."""
    hs, ws, ht, wt = case.tensors
    keywords = {k: t if k.endswith("bias") else t.flatten() for k, t in case.keyword_tensors.items()}
    return replace(case, tensors=(hs.flatten(0, -2), ws, ht.flatten(0, -2), wt), keyword_tensors=keywords)


def at_tokens(case: Case, tokens: Any) -> Case:
    """Return the case at some of its tokens, which an index or a mask selects."""
    hs, ws, ht, wt = case.tensors
    keywords = {k: t if k.endswith("bias") else t[tokens] for k, t in case.keyword_tensors.items()}
    return replace(case, tensors=(hs[tokens], ws, ht[tokens], wt), keyword_tensors=keywords)


@with_examples
@given(cases())
def test_float32_error_is_at_most_three_times_the_float32_references(case: Case) -> None:
    check_float32(case)


@with_examples
@given(cases())
def test_statistics_equal_the_oracle(case: Case) -> None:
    assert_stats_close(case.run(), case.oracle())


@with_few_examples
@given(cases(dtypes=HALF))
def test_gradients_of_half_inputs_are_rounded_once(case: Case) -> None:
    check_half(case)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@with_few_examples
@given(cases(dtypes=(torch.float64,)))
def test_float64_inputs_are_computed_in_float64(case: Case) -> None:
    check_float64(case)


@with_few_examples
@given(cases())
def test_divergence_is_never_negative(case: Case) -> None:
    # The clipped sum is no divergence, and may be negative.
    options: dict[str, Any] = {"hard_weight": 0.0, "reduction": "none", "normalizer": None}
    assert (case.loss(**options, entry_clip=None) >= 0).all()


@with_few_examples
@given(cases(dtypes=(torch.float32, *HALF)), some_divergence, st.sampled_from([None, 0.01]))
def test_identical_models_give_exactly_zero(
    case: Case, divergence: dict[str, Any], entry_clip: float | None
) -> None:
    hs, ws, *_ = case.tensors
    options = {
        **divergence,
        "entry_clip": entry_clip,
        "temperature": case.options["temperature"],
        "reduction": case.options["reduction"],
        "student_softcap": case.options["student_softcap"],
        "teacher_softcap": case.options["student_softcap"],
    }
    bias = case.keyword_tensors.get("student_bias")
    biases = {} if bias is None else {"student_bias": bias, "teacher_bias": bias}
    assert_zero(Case((hs, ws, hs, ws), biases, options).run())


@with_few_examples
@given(cases())
def test_chunks_change_results_by_rounding_alone(case: Case) -> None:
    one_chunk = case.with_options(workspace_bytes=1 << 30).run()
    assert_results_close(case.with_options(workspace_bytes=case.min_workspace()).run(), one_chunk, 1e-5)


def test_smallest_workspace_holds_one_token_per_chunk() -> None:
    # Guards the tests that use min_workspace, which see many chunks only while this holds.
    case = random_case(n=7)
    plans: list[ChunkPlan] = []

    def spy(*args: Any, **options: Any) -> ChunkPlan:
        plans.append(plan_chunks(*args, **options))
        return plans[-1]

    minimum = case.min_workspace()
    with mock.patch.object(chunked_memory, "plan_chunks", spy):
        case.with_options(workspace_bytes=minimum).run()
    assert [len(list(plan.chunks())) for plan in plans] == [7]


@with_few_examples
@given(cases())
def test_losses_of_two_halves_with_one_normalizer_add_up(case: Case) -> None:
    case = flattened(case).with_options(reduction="mean", normalizer=torch.tensor(5.0))
    half = len(case.tensors[0]) // 2
    parts = at_tokens(case, slice(0, half)).loss() + at_tokens(case, slice(half, None)).loss()
    assert_close(parts, case.loss(), 1e-5)


@with_few_examples
@given(cases())
def test_masked_tokens_may_hold_nan(case: Case) -> None:
    hs, ws, ht, wt = (t.clone() for t in case.tensors)
    mask = torch.arange(hs[..., 0].numel()).reshape(hs.shape[:-1]) % 2 == 0
    case = with_tensors(case, mask=mask)
    hs[~mask], ht[~mask] = math.nan, math.nan
    assert_results_equal(replace(case, tensors=(hs, ws, ht, wt)).run(), case.run())


@with_few_examples
@given(cases())
def test_masked_tokens_equal_absent_ones(case: Case) -> None:
    case = flattened(case).with_options(reduction="sum", normalizer=None)
    mask = torch.arange(len(case.tensors[0])) % 3 != 1
    keywords = {k: t for k, t in case.keyword_tensors.items() if k != "mask"}
    packed = at_tokens(replace(case, keyword_tensors=keywords), mask)
    assert_close(with_tensors(case, mask=mask).loss(), packed.loss(), 1e-6)


@for_each_divergence
@pytest.mark.parametrize("tokens", ["none", "all masked"])
def test_no_valid_token_gives_zero_loss_and_gradients(divergence: dict[str, Any], tokens: str) -> None:
    case = random_case(n=0 if tokens == "none" else 3, **divergence)
    if tokens == "all masked":
        case = with_tensors(case, mask=torch.zeros(3, dtype=torch.bool))
    assert_zero(case.run())


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("normalizer", [0, 0.0, 17])
def test_no_valid_token_gives_zero_whatever_the_normalizer(normalizer: float, backend: str) -> None:
    case = with_tensors(random_case(n=3), mask=torch.zeros(3, dtype=torch.bool))
    assert_zero(case.with_options(normalizer=torch.tensor(normalizer)).run(backend))


@pytest.mark.parametrize(
    "name", ["hidden and heads", "student_bias", "teacher_bias", "labels", "token_weight", "mask"]
)
def test_layout_of_the_tensors_does_not_matter(name: str) -> None:
    keywords = {
        "student_bias": torch.randn(50),
        "teacher_bias": torch.randn(50),
        "labels": torch.tensor([3, 49, -100, 0, 7]),
        "token_weight": torch.rand(5),
        "mask": torch.tensor([True, True, True, False, True]),
    }
    if name == "hidden and heads":
        del keywords["mask"]  # the tokens are a slice, not a gathered copy
    case = with_tensors(random_case(hard_weight=0.5), **keywords)
    tensors, keywords = case.tensors, dict(case.keyword_tensors)
    if name in keywords:
        keywords[name] = strided(keywords[name])
    else:
        hs, ws, ht, wt = map(strided, tensors)
        tensors = (hs, ws, ht, wt)
    result = replace(case, tensors=tensors, keyword_tensors=keywords).run()
    assert_results_close(result, case.oracle(), 1e-5)


@pytest.mark.parametrize("name", ["labels", "student_bias"])
def test_layout_of_vectors_does_not_matter_without_a_mask(name: str) -> None:
    keywords = {"labels": torch.tensor([3, 49, -100, 0, 7]), "student_bias": torch.randn(50)}
    case = with_tensors(random_case(hard_weight=0.5), **keywords)
    result = with_tensors(case, **{name: strided(keywords[name])}).run()
    assert_results_close(result, case.oracle(), 1e-5)


@with_few_examples
@given(cases())
def test_order_of_the_vocabulary_does_not_matter(case: Case) -> None:
    hs, ws, ht, wt = case.tensors
    vocab = min(len(ws), len(wt))
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    options = {**case.divergence, "temperature": case.options["temperature"]}
    expected = Case((hs, ws[:vocab], ht, wt[:vocab]), {}, options).loss()
    assert_close(Case((hs, ws[order], ht, wt[order]), {}, options).loss(), expected, 1e-5)


@with_few_examples
@given(cases())
def test_order_of_the_tokens_does_not_matter(case: Case) -> None:
    case = flattened(case).with_options(reduction="none", normalizer=None)
    order = torch.randperm(len(case.tensors[0]), generator=torch.Generator().manual_seed(0))
    assert_close(at_tokens(case, order).loss(), case.loss()[order], 1e-5)


@for_each_divergence
def test_constant_added_to_all_logits_does_not_matter(divergence: dict[str, Any]) -> None:
    case = random_case(**divergence)
    assert_close(with_tensors(case, student_bias=torch.full((50,), 64.0)).loss(), case.loss(), 1e-4)


def logits_case(student: Tensor, teacher: Tensor, divergence: dict[str, Any]) -> Case:
    """Return a case with exactly these logits, which go through identity heads."""
    head = torch.eye(student.shape[1])
    return Case((student, head, teacher, head), {}, divergence)


@for_each_divergence
@pytest.mark.parametrize("size", [1e4, 1e3, 100.0])
def test_logits_of_any_size_equal_the_oracle(divergence: dict[str, Any], size: float) -> None:
    student = torch.tensor([[size, -size, 0.0, 1.0], [-size, -size, size, size], [0.0, size, 1.0, -size]])
    teacher = torch.tensor([[-size, size, 0.0, 1.0], [-size, -size, size, size - 1], [0.0, size, 2.0, -size]])
    case = logits_case(student, teacher, divergence)
    assert_results_close(case.run(), case.oracle(), 1e-5)


@for_each_divergence
def test_token_forbidden_by_both_models_does_not_count(divergence: dict[str, Any]) -> None:
    case = random_case(**divergence)
    hs, ws, ht, wt = case.tensors
    forbidden = torch.zeros(50)
    forbidden[::3] = -math.inf
    allowed = forbidden == 0
    result = with_tensors(case, student_bias=forbidden, teacher_bias=forbidden).run()
    expected = replace(case, tensors=(hs, ws[allowed], ht, wt[allowed])).oracle()
    assert_close(result.loss, expected.loss, 1e-6)
    assert_close(result.grads[0], expected.grads[0], 1e-5)
    assert_stats_close(result, expected)


@for_each_divergence
def test_token_forbidden_by_the_teacher_alone_equals_the_oracle(divergence: dict[str, Any]) -> None:
    bias = torch.zeros(50)
    bias[::3] = -math.inf
    options = finite_where_forbidden("teacher", divergence)
    case = with_tensors(random_case(**options), teacher_bias=bias)
    result = case.run()
    assert result.loss.isfinite()
    assert_results_close(result, case.oracle(), 1e-5)


@for_each_divergence
def test_token_forbidden_by_the_student_alone_equals_a_very_unlikely_one(divergence: dict[str, Any]) -> None:
    # The reference's gradient would be NaN at -inf.
    forbidden, unlikely = torch.zeros(50), torch.zeros(50)
    forbidden[::3], unlikely[::3] = -math.inf, -1e30
    case = random_case(**finite_where_forbidden("student", divergence))
    result = with_tensors(case, student_bias=forbidden).run()
    assert result.loss.isfinite()
    assert_results_close(result, with_tensors(case, student_bias=unlikely).oracle(), 1e-5)


@for_each_divergence
@pytest.mark.parametrize("teacher_softcap", [5.0, 8.0, None], ids=["same", "another", "no"])
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
def test_softcap_bounds_the_logit_of_a_forbidden_token(
    divergence: dict[str, Any], teacher_softcap: float | None, backend: str
) -> None:
    # More columns than a tile of the kernels, and fewer than two.
    student_bias, teacher_bias = torch.zeros(3000), torch.zeros(3000)
    student_bias[::3] = -math.inf
    if teacher_softcap is not None:
        teacher_bias[::5] = -math.inf
    options = {**divergence, "student_softcap": 5.0, "teacher_softcap": teacher_softcap, "hard_weight": 0.5}
    case = with_tensors(
        random_case(n=3, vocab=3000, **options),
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        labels=torch.tensor([3, 2999, 2997]),
    )
    result, oracle = case.run(backend), case.oracle()
    assert oracle.loss.isfinite()
    assert_results_close(result, oracle, 1e-5)
    assert_stats_close(result, oracle)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_divergence_of_disjoint_models_is_the_entropy_of_beta(beta: float) -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert logits_case(student, teacher, {"beta": beta}).loss().item() == pytest.approx(entropy, rel=1e-6)


def test_entropies_of_uniform_models_are_log_v() -> None:
    stats = logits_case(torch.zeros(2, 64), torch.ones(2, 64), {}).run().stats
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
def test_loss_of_two_tokens_equals_the_closed_form(beta: float, expected: float) -> None:
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    assert logits_case(student, teacher, {"beta": beta}).loss().item() == pytest.approx(expected, rel=1e-6)


def test_forward_kl_of_a_one_hot_teacher_and_a_uniform_student_is_log_v() -> None:
    teacher = torch.full((1, 64), -1e4)
    teacher[0, 5] = 0.0
    loss = logits_case(torch.zeros(1, 64), teacher, {"beta": 0.0}).loss()
    assert loss.item() == pytest.approx(math.log(64), rel=1e-6)


def test_frozen_weight_gets_no_gradient_and_leaves_the_hidden_gradient_alone() -> None:
    case = random_case()
    hs, ws, ht, wt = case.tensors
    expected = case.run().grads[0]
    hs.requires_grad_()
    fused_linear_jsd(hs, ws, ht, wt, backend=BACKEND).backward()
    assert ws.grad is None
    assert hs.grad is not None
    assert expected is not None
    assert torch.equal(hs.grad, expected)


def test_strided_inputs_equal_the_oracle() -> None:
    student, student_head = (torch.randn(8, columns, device=DEVICE).T for columns in (6, 50))
    teacher, teacher_head = torch.randn(6, 12, device=DEVICE)[:, ::2], torch.randn(100, 6, device=DEVICE)[::2]
    case = Case((student, student_head, teacher, teacher_head))
    assert not any(t.is_contiguous() for t in case.tensors)
    assert_results_close(case.run(), case.oracle(), 1e-5)


@for_each_divergence
@pytest.mark.parametrize("index", [0, 2], ids=["student", "teacher"])
def test_nan_in_hidden_states_reaches_loss_and_gradients(divergence: dict[str, Any], index: int) -> None:
    case = random_case(**divergence)
    case.tensors[index][0, 0] = math.nan
    result = case.run()
    assert result.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in result.grads)
