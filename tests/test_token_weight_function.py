"""Token weights that are a function of the tokens' statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, DTYPES, EMULATED_GPU, INTERPRETED
from fused_distill import DistillStats, fused_linear_jsd, fused_linear_topk_jsd, reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

N, V, D, K = 70, 60, 16, 5
# Several chunks. On a GPU they have at least 128 tokens.
CHUNKED = {"workspace_bytes": 1 << 16} if DEVICE.type == "cpu" and not EMULATED_GPU else {}


def make_tensors(dtype: torch.dtype, *, topk: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(N, D, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(V, D, generator=generator) / 4 for _ in range(2))
    student = (t.to(DEVICE, dtype).requires_grad_() for t in (hidden, head))
    if not topk:
        return *student, teacher.to(DEVICE, dtype), teacher_head.to(DEVICE, dtype)
    top = (teacher @ teacher_head.T).log_softmax(-1).topk(K)
    return *student, top.values.to(DEVICE, dtype), top.indices.to(DEVICE)


CALLS = [
    pytest.param(fused_linear_jsd, {"beta": beta}, id=f"full-beta{beta:g}") for beta in (0.0, 0.5, 1.0)
] + [
    pytest.param(fused_linear_topk_jsd, {"tail": tail}, id=f"top-k-{tail}")
    for tail in ("bucket", "renormalize", "truncate")
]
each_loss = pytest.mark.parametrize(("loss_fn", "options"), CALLS)


def of_some_tokens(stats: DistillStats) -> Tensor:
    """Weigh about half of the tokens by their reverse KL."""
    return ((1e4 * stats.teacher_entropy).sin() > 0) * stats.reverse_kl.abs()


def result(
    loss_fn: Callable[..., Any], tensors: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = loss_fn(*tensors, backend=BACKEND, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), tensors[:2])


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_function_gives_what_its_weights_give(
    loss_fn: Callable[..., Any], options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    tensors = make_tensors(dtype, topk=loss_fn is fused_linear_topk_jsd)
    mask = (torch.arange(N) % 7 != 0).to(DEVICE)
    options = {**options, **CHUNKED, "mask": mask, "reduction": reduction}
    _, stats = loss_fn(*tensors, backend=BACKEND, return_stats=True, **options)
    weights = torch.zeros_like(stats.reverse_kl).masked_scatter(
        mask, of_some_tokens(stats.map(lambda c: c[mask]))
    )
    assert 0 < int((weights[mask] > 0).sum()) < int(mask.sum())
    expected = result(loss_fn, tensors, token_weight=weights, **options)
    actual = result(loss_fn, tensors, token_weight=of_some_tokens, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_loss
def test_the_reference_takes_a_function_too(loss_fn: Callable[..., Any], options: dict[str, Any]) -> None:
    topk = loss_fn is fused_linear_topk_jsd
    tensors = make_tensors(torch.float64 if BACKEND != "triton" else torch.float32, topk=topk)
    by_definition = reference.linear_topk_jsd if topk else reference.linear_jsd
    loss = by_definition(*tensors, token_weight=of_some_tokens, **options)
    expected = loss.detach(), torch.autograd.grad(loss, tensors[:2])
    actual = result(loss_fn, tensors, token_weight=of_some_tokens, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@each_loss
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_without_valid_tokens_it_is_not_called(
    loss_fn: Callable[..., Any], options: dict[str, Any], backend: str
) -> None:
    tensors = make_tensors(DTYPES[0], topk=loss_fn is fused_linear_topk_jsd)
    mask = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    largest = lambda stats: stats.reverse_kl / stats.reverse_kl.max()  # noqa: E731
    assert loss_fn(*tensors, mask=mask, token_weight=largest, backend=backend, **options) == 0


def test_a_second_backward_pass_calls_it_again() -> None:
    tensors = make_tensors(DTYPES[0], topk=False)
    loss = fused_linear_jsd(*tensors, token_weight=of_some_tokens, backend=BACKEND)
    first = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors[:2]), first, rtol=0, atol=0)


def test_it_sees_each_chunk_in_order_with_its_token_data() -> None:
    tensors, mask = make_tensors(DTYPES[0], topk=False), (torch.arange(N) % 3 != 0).to(DEVICE)
    seen: list[Tensor] = []

    def weigh(stats: DistillStats, position: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert position.shape == stats.forward_kl.shape
        seen.append(position)
        return position / N

    positions = torch.arange(N, device=DEVICE)
    options: dict[str, Any] = {"mask": mask, "backend": BACKEND, **CHUNKED}
    loss = fused_linear_jsd(*tensors, token_weight=weigh, token_data={"position": positions}, **options)
    assert torch.equal(torch.cat(seen)[: int(mask.sum())], positions[mask])
    expected = fused_linear_jsd(*tensors, token_weight=positions / N, **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED or EMULATED_GPU, reason="counts the products of the plain path")
@pytest.mark.parametrize("topk", [False, True])
def test_it_costs_no_product(topk: bool) -> None:
    loss_fn = fused_linear_topk_jsd if topk else fused_linear_jsd
    tensors = make_tensors(torch.float32, topk=topk)

    def flops(token_weight: object) -> int:
        with FlopCounterMode(display=False) as counter:
            result(loss_fn, tensors, token_weight=token_weight)
        return counter.get_total_flops()

    with_weights = flops(torch.ones(N, device=DEVICE))
    assert flops(of_some_tokens) == with_weights == 2 * N * V * D * (3 if topk else 4)


@pytest.mark.parametrize(
    ("token_weight", "token_data", "error", "message"),
    [
        (lambda stats: stats.forward_kl[1:], None, ValueError, r"token_weight must .* \(70,\), got \(69,\)"),
        (lambda stats: 1.0, None, TypeError, r"token_weight must return a torch.Tensor, got float"),
        (lambda stats: 1 / 0, None, ZeroDivisionError, "^division by zero$"),
        (None, {"a": torch.ones(N)}, ValueError, "token_data goes with a function as token_weight"),
        (of_some_tokens, [1], TypeError, "token_data must be a dict of tensors, got list"),
        (of_some_tokens, {"a": torch.ones(3)}, ValueError, r"token_data\['a'\] must have the shape"),
        (of_some_tokens, {"a": 1}, TypeError, r"token_data\['a'\] must be a torch.Tensor, got int"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("topk", [False, True])
def test_errors_name_the_argument_or_come_unchanged(
    token_weight: object, token_data: Any, error: type[Exception], message: str, topk: bool
) -> None:
    tensors = make_tensors(DTYPES[0], topk=topk)
    if isinstance(token_data, dict):
        token_data = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in token_data.items()}
    loss_fn: Any = fused_linear_topk_jsd if topk else fused_linear_jsd
    with pytest.raises(error, match=message):
        loss_fn(*tensors, token_weight=token_weight, token_data=token_data, backend=BACKEND)


def test_token_data_changed_before_a_second_pass_is_refused() -> None:
    tensors, data = make_tensors(DTYPES[0], topk=False), torch.ones(N, device=DEVICE)
    loss = fused_linear_jsd(
        *tensors, token_weight=lambda stats, x: x, token_data={"x": data}, reduction="none", backend=BACKEND
    )
    data.add_(1)
    with pytest.raises(RuntimeError, match=r"token_data\['x'\]"):
        loss.sum().backward()
