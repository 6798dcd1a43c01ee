"""Skewed and mixed KL, total variation and clipped entries: limits, weights of each token, closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED, TOPK, Case
from checks import DIVERGENCES, assert_close, assert_results_close, assert_zero, for_each_divergence
from fused_distill import FusedLinearJSDLoss, fused_linear_jsd
from fused_distill.chunked.grad_scale import largest_logit_gradient
from fused_distill.config import LossConfig, TopKLossConfig

NEW = [options for options in DIVERGENCES.values() if "divergence" in options]


def random_case(full: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(size, 6, generator=generator).to(dtype) for size in (5, 50, 5, 50))
    if full:
        return Case((hs, ws, ht, wt), {}, options)
    top = torch.log_softmax(ht.double() @ wt.double().T, -1).topk(7)
    return Case((hs, ws, top.values, top.indices), {}, options, TOPK)


def per_token(case: Case, weight: torch.Tensor) -> Case:
    return replace(case, keyword_tensors={"reverse_weight": weight})


both_teachers = pytest.mark.parametrize("full", [True, False], ids=["full", "topk"])


@both_teachers
@pytest.mark.parametrize(
    ("options", "beta"),
    [
        ({"divergence": "skew_forward_kl", "alpha": 0.0}, 0.0),
        ({"divergence": "skew_reverse_kl", "alpha": 0.0}, 1.0),
        ({"divergence": "mixed_kl", "reverse_weight": 0.0}, 0.0),
        ({"divergence": "mixed_kl", "reverse_weight": 1.0}, 1.0),
    ],
    ids=str,
)
def test_limits_are_forward_and_reverse_kl(options: dict[str, Any], beta: float, full: bool) -> None:
    assert_results_close(random_case(full, **options).run(), random_case(full, beta=beta).run(), 1e-6, 0.0)


@both_teachers
@pytest.mark.parametrize("kind", ["one per token", "0-d"])
def test_weights_of_tokens_equal_the_number(kind: str, full: bool) -> None:
    case = random_case(full, divergence="mixed_kl")
    weight = torch.full((5,) if kind == "one per token" else (), 0.3)
    expected = case.with_options(reverse_weight=0.3).run()
    assert_results_close(per_token(case, weight).run(), expected, 1e-6, 0.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_each_token_has_its_own_weight(reduction: str) -> None:
    case = random_case(divergence="mixed_kl", reduction="none")
    weights = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    losses = [case.with_options(reverse_weight=w).loss()[i] for i, w in enumerate(weights.tolist())]
    expected = torch.stack(losses) if reduction == "none" else sum(losses)
    result = per_token(case.with_options(reduction=reduction), weights).loss()
    assert_close(result, torch.as_tensor(expected), 1e-6, 0.0)


def test_weight_of_a_masked_token_may_be_anything() -> None:
    weights, mask = torch.tensor([0.1, math.nan, 0.4, 7.0, 0.3]), torch.tensor([1, 0, 1, 0, 1]).bool()
    case = random_case(divergence="mixed_kl")
    masked = replace(case, keyword_tensors={"mask": mask, "reverse_weight": weights})
    cleared = replace(case, keyword_tensors={"mask": mask, "reverse_weight": weights.where(mask, 0.5)})
    assert_results_close(masked.run(), cleared.run(), 0.0, 0.0)


@both_teachers
@for_each_divergence
def test_a_bound_that_no_term_reaches_changes_nothing(divergence: dict[str, Any], full: bool) -> None:
    case = random_case(full, **divergence)
    assert_results_close(case.with_options(entry_clip=1e6).run(), case.run(), 2e-6, 0.0)


@for_each_divergence
def test_identical_models_have_loss_zero_with_a_bound(divergence: dict[str, Any]) -> None:
    hs, ws, *_ = random_case().tensors
    assert_zero(Case((hs, ws, hs, ws), {}, {**divergence, "entry_clip": 0.01}).run())


@pytest.mark.parametrize(
    ("divergence", "terms"),
    [
        # Teacher 3/4, 1/4 and student 1/4, 3/4.
        ({"beta": 0.0}, [0.75 * math.log(3), -0.25 * math.log(3)]),
        ({"beta": 1.0}, [-0.25 * math.log(3), 0.75 * math.log(3)]),
        ({"divergence": "skew_forward_kl", "alpha": 0.5}, [0.75 * math.log(1.5), 0.25 * math.log(0.5)]),
        ({"divergence": "skew_reverse_kl", "alpha": 0.5}, [0.25 * math.log(0.5), 0.75 * math.log(1.5)]),
        ({"divergence": "mixed_kl", "reverse_weight": 0.5}, [0.25 * math.log(3)] * 2),
        ({"divergence": "total_variation"}, [0.25, 0.25]),
    ],
    ids=str,
)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_loss_of_two_tokens_equals_the_closed_form(
    divergence: dict[str, Any], terms: list[float], clip: float | None
) -> None:
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    head = torch.eye(2)
    case = Case((student, head, teacher, head), {}, {**divergence, "entry_clip": clip})
    expected = sum(min(term, clip or math.inf) for term in terms)
    assert case.loss().item() == pytest.approx(expected, rel=1e-6)


def test_total_variation_of_disjoint_models_is_one() -> None:
    student, teacher, head = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), torch.eye(2)
    case = Case((student, head, teacher, head), {}, {"divergence": "total_variation"})
    assert case.loss().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("entry_clip", [None, 10.0], ids=["unclipped", "no term is clipped"])
def test_total_variation_has_slope_0_where_the_models_are_equal(entry_clip: float | None) -> None:
    # The first token has the same logit in both models, the others have each other's.
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    head = torch.eye(3)
    case = Case(
        (student, head, teacher, head), {}, {"divergence": "total_variation", "entry_clip": entry_clip}
    )
    p = torch.softmax(student.double(), -1)
    slope = torch.tensor([[0.0, -0.5, 0.5]], dtype=torch.float64)
    gradient = case.run().grads[0]
    assert gradient is not None
    assert_close(gradient.cpu(), p * (slope - (p * slope).sum()), 1e-6, 0.0)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("divergence", NEW, ids=str)
def test_gradients_pass_gradcheck(divergence: dict[str, Any], entry_clip: float | None) -> None:
    case = random_case(dtype=torch.float64, **divergence, entry_clip=entry_clip)
    hs, ws, ht, wt = (t[:9] for t in case.tensors)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused_linear_jsd(hidden, weight, ht, wt, temperature=1.3, student_softcap=4.0, **case.options)

    assert torch.autograd.gradcheck(loss, (hs.clone().requires_grad_(), ws.clone().requires_grad_()))


@pytest.mark.parametrize("divergence", NEW, ids=str)
def test_second_backward_pass_gives_the_same_gradient(divergence: dict[str, Any]) -> None:
    hs, *others = random_case().tensors
    hs = hs.requires_grad_()
    loss = fused_linear_jsd(hs, *others, backend=BACKEND, entry_clip=0.3, **divergence)
    first, second = (torch.autograd.grad(loss, hs, retain_graph=True)[0] for _ in range(2))
    assert_close(second, first, 1e-6, 0.0)


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.1, 0.9])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_bound_on_logit_gradients_holds(name: str, alpha: float, clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 2, 300).unsqueeze(-1)
    student, teacher = (spread * torch.randn(300, 9, generator=generator).double() for _ in range(2))
    options: dict[str, Any] = {"divergence": name, "entry_clip": clip}
    if name != "total_variation":
        options["alpha"] = alpha
    head = torch.eye(9, dtype=torch.float64)
    gradient = Case((student, head, teacher, head), {}, {**options, "reduction": "sum"}).run().grads[0]
    assert gradient is not None
    assert gradient.abs().max() <= largest_logit_gradient(LossConfig(**options))


def test_module_passes_weights_of_tokens_on() -> None:
    case, weights = random_case(divergence="mixed_kl"), torch.linspace(0, 1, 5).to(DEVICE)
    module = FusedLinearJSDLoss(divergence="mixed_kl", backend=BACKEND)
    assert torch.equal(module(*case.tensors, reverse_weight=weights), per_token(case, weights).loss())  # pyright: ignore[reportArgumentType]


INVALID: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("divergence must be one of 'jsd'", ValueError, {"divergence": "kl"}),
    ("alpha must be at least 0 and less than 1, got 1.0", ValueError, {"alpha": 1.0}),
    ("alpha must be at least 0", ValueError, {"divergence": "skew_forward_kl", "alpha": -0.1}),
    ("alpha is an option of a skewed KL, got 0.3 with 'jsd'", ValueError, {"alpha": 0.3}),
    ('beta is an option of divergence "jsd"', ValueError, {"divergence": "total_variation", "beta": 1.0}),
    ("entry_clip must be positive or None, got 0", ValueError, {"entry_clip": 0}),
    ("entry_clip must be a number, got str", TypeError, {"entry_clip": "1"}),
    ('reverse_weight is an option of divergence "mixed_kl"', ValueError, {"reverse_weight": 0.3}),
    ("reverse_weight must be between 0", ValueError, {"divergence": "mixed_kl", "reverse_weight": 1.5}),
    ("reverse_weight must be a number", TypeError, {"divergence": "mixed_kl", "reverse_weight": "1"}),
    ("reverse_weight", ValueError, {"divergence": "mixed_kl", "reverse_weight": torch.ones(4)}),
    ("reverse_weight", TypeError, {"divergence": "mixed_kl", "reverse_weight": torch.ones(5).long()}),
    ("reverse_weight", ValueError, {"divergence": "mixed_kl", "reverse_weight": torch.full((5,), math.nan)}),
    ('surplus must be "ignore" with entry_clip', ValueError, {"entry_clip": 0.3, "surplus": "count"}),
]


@pytest.mark.parametrize(("message", "error", "options"), INVALID)
def test_invalid_option_is_named(message: str, error: type[Exception], options: dict[str, Any]) -> None:
    if DEVICE.type != "cpu" and "nan" in str(options):
        pytest.skip("values on a GPU are not read")
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=f"^{message}"):
        fused_linear_jsd(*random_case().tensors, backend=BACKEND, **options)


@pytest.mark.parametrize("options", [{"divergence": "total_variation"}, {"entry_clip": 0.3}])
def test_truncate_goes_with_an_unclipped_jsd_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'^tail "truncate" goes with divergence "jsd" without entry_clip'):
        TopKLossConfig(tail="truncate", **options)
