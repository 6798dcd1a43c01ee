"""Calls on the CPU that are planned as on a GPU, with its half-precision products emulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import HALF, INTERPRETED, TOPK, Case, LossResult, cases
from checks import assert_close, rounding_of, with_few_examples
from emulated_gpu import gpu_rules
from fused_distill import fused_linear_jsd
from fused_distill.chunked.grad_scale import excess_over_bound, float16_grad_scale, largest_logit_gradient
from fused_distill.chunked.lm_head import LMHead
from fused_distill.chunked.loop import _per_token
from fused_distill.config import LossConfig, TopKLossConfig
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


def roundings(result: LossResult, oracle: LossResult) -> list[float]:
    """Return each gradient's error as a multiple of that of the exact gradient rounded once."""
    ratios = []
    for actual, exact in zip(result.grads, oracle.grads, strict=True):
        assert actual is not None
        assert exact is not None
        rounding = (exact.to(actual.dtype).double() - exact).norm()
        ratios.append(float((actual.double() - exact).norm() / rounding))
    return ratios


def close_case(dtype: torch.dtype, loss: float, vocab: int = 2000) -> Case:
    """Return a call on flat distributions with about this loss."""
    generator = torch.Generator().manual_seed(0)
    n, size = 40, 32
    head = torch.randn(vocab, size, generator=generator) / size**0.5
    teacher_hidden = torch.randn(n, size, generator=generator).to(dtype)
    noise = torch.randn(n, size, generator=generator) * (2 * loss) ** 0.5
    # The noise goes into the teacher's float32 states, where half precision would round it away.
    return Case((teacher_hidden, head.to(dtype), teacher_hidden.float() + noise, head.to(dtype).float()))


@with_few_examples
@given(cases(dtypes=HALF))
def test_half_gradients_are_within_three_roundings_of_the_exact_ones(case: Case) -> None:
    with gpu_rules():
        case = case if "workspace_bytes" not in case.options else with_small_workspace(case)
        result = case.run("torch")
    oracle = case.oracle()
    torch.testing.assert_close(result.loss.double(), oracle.loss, rtol=1e-5, atol=1e-5)
    for actual, exact in zip(result.grads, oracle.grads, strict=True):
        assert actual is not None
        assert exact is not None
        rounding = (exact.to(actual.dtype).double() - exact).norm()
        assert (actual.double() - exact).norm() <= 3 * rounding + 1e-5 * exact.norm() + 1e-6


@st.composite
def close_cases(draw: st.DrawFn, tail: bool) -> Case:
    """Draw a float16 call without labels whose teacher is the student and a little noise."""
    case = draw(cases(dtypes=(torch.float16,)))
    (hs, ws, *_), options = case.tensors, case.options
    keywords = {k: t for k, t in case.keyword_tensors.items() if k not in ("labels", "teacher_bias")}
    kept = ("temperature", "student_logit_scale", "student_softcap", "reduction", "normalizer")
    options = {name: options[name] for name in kept if name in options} | case.divergence
    options.pop("entry_clip", None)  # rounding decides which terms of close models are clipped
    noise = torch.randn(hs.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    teacher = hs.float() + 1e-3 * noise
    scale, softcap = options["student_logit_scale"], options["student_softcap"]
    bias = keywords.get("student_bias")
    if not tail:
        options |= {"teacher_logit_scale": scale, "teacher_softcap": softcap}
        keywords |= {} if bias is None else {"teacher_bias": bias.float()}
        return Case((hs, ws, teacher, ws.float()), keywords, options)
    logits = scale * (teacher.double() @ ws.double().T + (0 if bias is None else bias.double()))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    top = torch.log_softmax(logits / options["temperature"], -1).topk(min(8, len(ws)))
    options["tail"] = draw(st.sampled_from(["bucket", "renormalize"]))
    return Case((hs, ws, top.values, top.indices), keywords, options, TOPK)


@with_few_examples
@given(st.one_of(close_cases(tail=False), close_cases(tail=True)))
def test_close_models_keep_their_gradient_in_float16_with_every_option(case: Case) -> None:
    with gpu_rules():
        result = case.run("torch")
    oracle = case.oracle()
    assert_close(result.loss, oracle.loss, 1e-3, 1e-12)
    for actual, exact in zip(result.grads, oracle.grads, strict=True):
        assert actual is not None
        assert exact is not None
        assert_close(actual, exact, 1e-4, 3 * rounding_of(exact, torch.float16))


def with_small_workspace(case: Case) -> Case:
    """Return the call with as many times the smallest workspace of a GPU as it had."""
    before = case.options["workspace_bytes"]
    return case.with_options(workspace_bytes=case.min_workspace("torch") * (1 + before % 5))


def top_k_of(case: Case, k: int = 32) -> Case:
    """Return the call with the teacher's k most likely tokens instead of its head."""
    hs, ws, ht, wt = case.tensors
    top = torch.log_softmax(ht.double() @ wt.double().T, -1).topk(k)
    return replace(case, tensors=(hs, ws, top.values, top.indices), functions=TOPK)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [None, "bucket", "renormalize"])
def test_close_models_keep_their_gradient_in_float16(tail: str | None, beta: float) -> None:
    case = close_case(torch.float16, loss=1e-6)
    if tail is not None:
        case = top_k_of(case).with_options(tail=tail)
    case = case.with_options(beta=beta, reduction="sum")
    with gpu_rules():
        result = case.run("torch")
    oracle = case.oracle()
    # The top-k losses see a few percent of the probability.
    assert oracle.loss.item() / 40 == pytest.approx(1e-6, rel=0.9 if tail is None else 2)
    assert max(roundings(result, oracle)) < 3


@pytest.mark.parametrize("tail", [None, "bucket", "truncate"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_token_weights_do_not_overflow_float16_logit_gradients(
    reduction: str, tail: str | None
) -> None:
    case = close_case(torch.float16, loss=1.0)
    if tail is not None:
        case = top_k_of(case).with_options(tail=tail)
    weights = {"token_weight": torch.linspace(-3e4, 3e5, 40)}
    case = replace(case, keyword_tensors=weights).with_options(reduction=reduction, normalizer=None)
    case = case.with_options(student_logit_scale=1e-3)
    with gpu_rules():
        result = case.run("torch")
    assert max(roundings(result, case.oracle())) < 3


@given(
    st.sampled_from([0.0, 0.2, 0.5, 0.999]),
    st.floats(0.1, 10.0),
    st.floats(0.1, 4.0),
    st.floats(0.1, 30.0),
    st.integers(0, 1000),
)
def test_logit_gradients_stay_below_their_bound(
    beta: float, temperature: float, scale: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = LossConfig(beta=beta, temperature=temperature, student_logit_scale=scale, hard_weight=0.5)
    n, vocab = 20, 7
    logits = (spread * torch.randn(n, vocab, generator=generator).double()).requires_grad_()
    teacher, eye = spread * torch.randn(n, vocab, generator=generator).double(), torch.eye(vocab).double()
    loss = fused_linear_jsd(
        logits,
        eye,
        teacher,
        eye,
        labels=torch.randint(0, vocab, (n,), generator=generator),
        hard_weight=0.5,
        beta=beta,
        temperature=temperature,
        student_logit_scale=scale,
        reduction="sum",
        backend="reference",
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() <= largest_logit_gradient(config)


@pytest.mark.parametrize(
    "weight", [None, [0.0, 0.0], [1.0, torch.inf], [torch.nan], [], [-3e-30, 1e-38], [7.0]]
)
def test_scale_of_float16_gradients_is_a_power_of_two_that_uses_the_range(weight: list[float] | None) -> None:
    weights = None if weight is None else torch.tensor(weight)
    scale = float16_grad_scale(LossConfig(), weights, torch.device("cpu"))
    assert torch.frexp(scale).mantissa == 0.5
    largest = max([abs(w) for w in weight or [] if 0 < abs(w) < torch.inf] or [1.0])
    if weight != [1.0, torch.inf]:
        assert 2**13 <= largest * scale <= 2**15


def test_tokens_that_a_teacher_forbids_do_not_lower_the_scale_of_float16_gradients() -> None:
    logprobs = torch.tensor([[-1.0, -2048.0], [-1.0, -9999.0], [-1.0, -torch.inf]])
    excess = excess_over_bound(TopKLossConfig(beta=1.0), logprobs)
    assert excess is not None
    assert excess.tolist() == [4.0, 1.0, 1.0]


def test_a_head_under_autocast_is_converted_once_per_call() -> None:
    generator = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(s, 8, generator=generator) for s in (600, 90, 600, 90))
    hs.requires_grad_()
    converted = []
    over = LMHead.over

    def spy(self: LMHead, weight: torch.Tensor) -> LMHead:
        converted.append(over(self, weight))
        return converted[-1]

    with gpu_rules(), torch.autocast("cpu", torch.bfloat16), mock.patch.object(LMHead, "over", spy):
        loss = fused_linear_jsd(hs, ws, ht, wt, workspace_bytes=5 << 20, backend="torch")
    assert loss.isfinite()
    assert [head.weight.dtype for head in converted] == [torch.bfloat16, torch.bfloat16]
    assert not any(head.converts for head in converted)


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_reverse_weight_that_is_a_number_is_not_copied_to_the_gpu() -> None:
    with FakeTensorMode(), Operators() as operators:
        weights = _per_token(0.3, torch.empty(2, 3, device="cuda"))
    assert weights.shape == (2,)
    assert "aten._to_copy.default" not in operators.names
