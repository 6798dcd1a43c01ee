"""surplus="count": the student's rows from vocab_size on are one more outcome, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FULL, HALF, INTERPRETED, TOPK, Case, cases, topk_cases
from checks import (
    BETAS,
    TAILS,
    assert_close,
    assert_results_close,
    assert_results_equal,
    assert_stats_close,
    check_float32,
    check_float64,
    check_half,
    for_each_divergence,
    with_examples,
    with_few_examples,
)
from fused_distill import FusedLinearJSDLoss, plan, reference
from fused_distill.config import LossConfig
from hypothesis import given
from torch import Tensor

N, V, SURPLUS, DS, DT = 3, 40, 8, 4, 5


def counted(case: Case) -> Case:
    """Return the case with its surplus rows counted, in a workspace that holds them."""
    case = case.with_options(surplus="count", entry_clip=None)
    if "workspace_bytes" in case.options:
        case = case.with_options(workspace_bytes=2 * case.min_workspace())
    return case


def random_case(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    sizes = (N, DS), (V + SURPLUS, DS), (N, DT), (V, DT)
    a, b, c, d = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return Case((a, b, c, d), {}, {"surplus": "count", **options})


def with_logits(student: Tensor, teacher: Tensor, **options: Any) -> Case:
    """Return a case whose hidden states are logits, of float32 or float64."""
    heads = (torch.eye(logits.shape[1], dtype=logits.dtype) for logits in (student, teacher))
    tensors = (student, next(heads), teacher, next(heads))
    return Case(tensors, {}, {"surplus": "count", **options})


@with_examples
@given(cases().map(counted))
def test_full_loss_and_gradients_are_as_exact_as_float32(case: Case) -> None:
    check_float32(case)


@with_few_examples
@given(topk_cases().map(counted))
def test_topk_loss_and_gradients_are_as_exact_as_float32(case: Case) -> None:
    check_float32(case)


@with_few_examples
@given(cases().map(counted))
def test_statistics_equal_the_reference(case: Case) -> None:
    assert_stats_close(case.run(), case.oracle())


@with_few_examples
@given(cases(HALF).map(counted))
def test_half_precision_gradients_are_rounded_once(case: Case) -> None:
    check_half(case)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@with_few_examples
@given(cases((torch.float64,)).map(counted))
def test_float64_inputs_are_computed_in_float64(case: Case) -> None:
    check_float64(case)


@pytest.mark.parametrize("beta", BETAS)
def test_student_with_all_mass_on_a_surplus_row_is_penalized(beta: float) -> None:
    student = torch.zeros(1, 48)
    student[0, 45] = 50.0
    case = with_logits(student, torch.zeros(1, 40), beta=beta)
    assert case.with_options(surplus="ignore").loss() == 0
    # Forward KL is the log odds of the row, reverse KL -log 1e-7, and a mixture has two disjoint models.
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) if 0 < beta < 1 else 0.0
    expected = {0.0: 50.0 - math.log(40), 1.0: -math.log(1e-7)}.get(beta, entropy)
    assert case.loss().item() == pytest.approx(expected, rel=1e-5)


@for_each_divergence
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_is_the_divergence_over_tokens_and_one_more_outcome(
    divergence: dict[str, Any], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, size, generator=generator).double() for size in (48, 40))
    p = (student / temperature).softmax(-1)
    p = torch.cat([p[:, :40], p[:, 40:].sum(-1, keepdim=True)], -1)

    def teachers(probability: float) -> Tensor:
        outcome = torch.full((2, 1), probability, dtype=torch.float64)
        t = torch.cat([(teacher / temperature).softmax(-1), outcome], -1)
        return t / t.sum(-1, keepdim=True)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.xlogy(p, p / q).sum(-1)

    t, floored = teachers(0.0), teachers(1e-7)
    beta, alpha = divergence.get("beta", 0.5), divergence.get("alpha", 0.1)
    m = beta * t + (1 - beta) * p
    by_name: dict[object, Tensor] = {
        "skew_forward_kl": kl(t, alpha * t + (1 - alpha) * p),
        "skew_reverse_kl": kl(p, alpha * p + (1 - alpha) * t),
        "mixed_kl": 0.7 * kl(t, p) + 0.3 * kl(p, floored),
        "total_variation": 0.5 * (t - p).abs().sum(-1),
        0.0: kl(t, p),
        1.0: kl(p, floored),
    }
    key = divergence.get("divergence", beta)
    expected = by_name[key] if key in by_name else beta * kl(t, m) + (1 - beta) * kl(p, m)
    case = with_logits(student, teacher, **divergence, temperature=temperature, reduction="none")
    torch.testing.assert_close(case.oracle().loss, expected.to(DEVICE))


@for_each_divergence
def test_gradient_by_surplus_rows_equals_finite_differences(divergence: dict[str, Any]) -> None:
    case = random_case(torch.float64, **divergence, temperature=0.7, hard_weight=0.3)
    hs, ws, ht, wt = case.tensors
    labels = torch.tensor([1, -100, 39]).to(DEVICE)

    def loss(surplus_rows: Tensor) -> Tensor:
        weight = torch.cat([ws[:V], surplus_rows])
        return reference.linear_jsd(hs, weight, ht, wt, labels=labels, **case.options)

    assert torch.autograd.gradcheck(loss, ws[V:].clone().requires_grad_())


@for_each_divergence
@pytest.mark.parametrize("offset", [-40.0, -16.0, 0.0, 30.0, 400.0])
def test_surplus_rows_of_any_weight_keep_the_digits(divergence: dict[str, Any], offset: float) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, size, generator=generator) for size in (48, 40))
    student[:, 40:] += offset
    case = with_logits(student, teacher, **divergence, reduction="none")
    # A student with all its probability there has gradients of 0, from differences of float32 numbers.
    absolute = 4e-6 if offset > 0 else 0.0  # times the hidden states, as large as the offset, for the weight
    result, exact = case.run(), case.oracle()
    assert_close(result.loss, exact.loss, 1e-6, 0.0)
    assert_results_close(result, exact, 2e-6, absolute * max(1.0, offset))
    hidden, exact_hidden = result.grads[0], exact.grads[0]
    assert hidden is not None
    assert exact_hidden is not None
    # Relative to the gradient of the surplus columns alone, which may be small.
    assert_close(hidden[:, 40:], exact_hidden[:, 40:], 1e-5, absolute)


@pytest.mark.parametrize("backend", ["cpp", "torch"] if BACKEND == "cpp" else [BACKEND])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", [{}, {"divergence": "total_variation"}], ids=str)
def test_cross_entropy_beside_a_huge_surplus_logit_is_finite(
    divergence: dict[str, Any], temperature: float, backend: str
) -> None:
    # e^1000 overflows float64. The labelled token's probability is e^-1000.
    student, teacher = torch.zeros(1, 48), torch.zeros(1, 40)
    student[0, 45] = 1000.0
    case = with_logits(
        student, teacher, hard_weight=1.0, soft_weight=0.5, temperature=temperature, **divergence
    )
    case = Case(case.tensors, {"labels": torch.tensor([3])}, case.options)
    result, exact = case.run(backend), case.oracle()
    assert_close(result.loss, exact.loss, 1e-6, 0.0)
    assert_results_close(result, exact, 1e-6, 1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_close_models_without_surplus_mass_keep_the_digits(beta: float) -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(2, 40, generator=generator)
    student = torch.cat(
        [teacher + 1e-4 * torch.randn(2, 40, generator=generator), torch.full((2, 8), -60.0)], -1
    )
    case = with_logits(student, teacher, beta=beta)
    assert_close(case.run().loss, case.oracle().loss, 1e-5, 0.0)


@for_each_divergence
def test_forbidden_surplus_rows_count_nothing(divergence: dict[str, Any]) -> None:
    case = random_case(**divergence)
    bias = torch.zeros(V + SURPLUS).to(DEVICE)
    bias[V:] = -torch.inf
    case = Case(case.tensors, {"student_bias": bias}, case.options)
    ignored = case.with_options(surplus="ignore").run()
    result = case.run()
    assert_results_close(result, ignored, 1e-6, 1e-7)
    assert (result.grads[1][V:] == 0).all()  # pyright: ignore[reportOptionalSubscript]


def test_without_surplus_rows_both_choices_are_the_same() -> None:
    hs, ws, ht, wt = random_case().tensors
    case = Case((hs, ws[:V], ht, wt))
    assert_results_equal(case.with_options(surplus="count").run(), case.run())


@for_each_divergence
def test_full_loss_equals_the_bucket_of_a_teacher_known_at_every_token(divergence: dict[str, Any]) -> None:
    case = random_case(**divergence)
    hs, ws, ht, wt = case.tensors
    logprobs = torch.log_softmax(ht.double() @ wt.double().T, -1)
    ids = torch.arange(V).expand(N, V)
    topk = Case((hs, ws, logprobs, ids), {}, {**case.options, "vocab_size": V}, functions=TOPK)
    # The bucket gives the teacher 1e-7 of it for every beta, the full loss in reverse KL alone.
    assert topk.loss().item() == pytest.approx(case.loss().item(), abs=3e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_topk_loss_counts_surplus_rows_as_tail(tail: str) -> None:
    hs, ws, ht, wt = random_case().tensors
    logprobs, ids = torch.log_softmax(ht @ wt.T, -1).topk(4)
    case = Case((hs, ws, logprobs, ids), {}, {"tail": tail, "vocab_size": V}, functions=TOPK)
    all_rows = case.with_options(vocab_size=None)
    assert_results_equal(case.with_options(surplus="count").run(), all_rows.run())


@pytest.mark.parametrize("functions", [FULL, TOPK], ids=["full", "topk"])
@pytest.mark.parametrize("name", ["labels", "teacher_ids"])
def test_ids_of_surplus_rows_are_refused(functions: Any, name: str) -> None:
    hs, ws, ht, wt = random_case().tensors
    wrong = torch.full((N, 1), V).to(DEVICE)
    if functions is FULL:
        if name == "teacher_ids":
            return
        teacher = (ht, wt)
    else:
        teacher = (torch.zeros(N, 1).to(DEVICE) - 1, wrong if name == "teacher_ids" else wrong - 1)
    options: dict[str, Any] = {"surplus": "count", "vocab_size": V}
    if name == "labels":
        options |= {"labels": wrong.squeeze(1), "hard_weight": 0.5}
    with pytest.raises(ValueError, match=f"^{name} must be in \\[0, {V}\\)"):
        functions[0](hs, ws, *teacher, backend=BACKEND, **options)


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's backends")
def test_pytorch_rows_give_the_same_results() -> None:
    case = random_case(beta=0.3, temperature=0.7)
    assert_results_close(case.run("torch"), case.run(), 1e-6, 1e-7)


def test_module_passes_the_choice_on() -> None:
    case = random_case()
    assert torch.equal(FusedLinearJSDLoss(surplus="count", backend=BACKEND)(*case.tensors), case.loss())  # pyright: ignore[reportArgumentType]


def test_process_group_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_distill.config._require_process_group", lambda group, backend: None)
    with pytest.raises(ValueError, match=r'^surplus must be "ignore" with process_group'):
        LossConfig(surplus="count", process_group=object())  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
def test_plan_has_the_surplus_columns_in_the_students_products_alone() -> None:
    tensors = [t.requires_grad_() for t in random_case().tensors]
    products = {p.name: p for p in plan(*tensors, surplus="count").products}
    assert (products["student logits"].n, products["teacher logits"].n) == (V + SURPLUS, V)
    assert products["weight gradient"].m == V + SURPLUS


def test_peak_of_surplus_rows_is_not_the_teachers_most_likely_token() -> None:
    student, teacher = torch.zeros(1, 48), torch.zeros(1, 40)
    student[0, 7], student[0, 45], teacher[0, 7] = 3.0, 4.0, 3.0
    case = with_logits(student, teacher)
    assert not case.run().stats.top1_agreement.item()
    assert case.with_options(surplus="ignore").run().stats.top1_agreement.item()
