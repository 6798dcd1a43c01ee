"""The loss in training code: accumulation, frozen parts, mixed dtypes, torch.compile, number of products."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import DEVICE
from fused_distill import FusedLinearJSDLoss, fused_linear_jsd
from fused_distill.config import Reduction
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DS, DT, V = 8, 5, 40
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def tensors(dtype: torch.dtype = torch.float32, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return randn(n, DS).requires_grad_(), randn(V, DS).requires_grad_(), randn(n, DT), randn(V, DT)


class Products(TorchDispatchMode):
    """Records the shapes (m, k, n) of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.shapes.append((*args[0].shape, len(args[1])))
        elif func.overloadpacket in PRODUCTS:
            a, b = args[-2:]
            self.shapes.append((*a.shape, b.shape[1]))
        return func(*args, **(kwargs or {}))


def product_shapes(
    hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, **options: Any
) -> list[tuple[int, int, int]]:
    with Products() as seen:
        loss = fused_linear_jsd(hs, ws, ht, wt, backend="torch", **options)
        if loss.requires_grad:
            loss.backward()
    return sorted(seen.shapes)


def test_training_takes_four_products() -> None:
    assert product_shapes(*tensors()) == sorted([(6, DS, V), (6, DT, V), (6, V, DS), (V, 6, DS)])


def test_frozen_head_takes_no_weight_product() -> None:
    hs, ws, ht, wt = tensors()
    assert product_shapes(hs, ws.detach(), ht, wt) == sorted([(6, DS, V), (6, DT, V), (6, V, DS)])


def test_detached_hidden_states_take_no_hidden_product() -> None:
    hs, ws, ht, wt = tensors()
    assert product_shapes(hs.detach(), ws, ht, wt) == sorted([(6, DS, V), (6, DT, V), (V, 6, DS)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_takes_the_two_projections(mode: Any) -> None:
    with mode():
        assert product_shapes(*tensors()) == sorted([(6, DS, V), (6, DT, V)])


def test_masked_tokens_take_no_product() -> None:
    mask = torch.tensor([False, True, False, False, True, False])
    assert {min(shape) for shape in product_shapes(*tensors(), mask=mask)} == {2}


def test_columns_beyond_vocab_size_take_no_product() -> None:
    shapes = product_shapes(*tensors(), vocab_size=30)
    assert shapes == sorted([(6, DS, 30), (6, DT, 30), (6, 30, DS), (30, 6, DS)])


def test_micro_batches_accumulate_the_gradient_of_the_batch() -> None:
    hs, ws, ht, wt = tensors(n=7)
    fused_linear_jsd(hs, ws, ht, wt).backward()
    batch_grads, ws.grad, hs.grad = (hs.grad, ws.grad), None, None
    for rows in (slice(0, 3), slice(3, 7)):
        fused_linear_jsd(hs[rows], ws, ht[rows], wt, normalizer=torch.tensor(7)).backward()
    torch.testing.assert_close((hs.grad, ws.grad), batch_grads)


def test_head_tied_to_the_embedding_gets_both_gradients() -> None:
    _, ws, ht, wt = tensors()
    ids = torch.tensor([3, 1, 3, 0, 39, 7])
    fused_linear_jsd(torch.tanh(ws[ids]), ws, ht, wt, backend="torch").backward()
    fused, ws.grad = ws.grad, None
    fused_linear_jsd(torch.tanh(ws[ids]), ws, ht, wt, backend="reference").backward()
    torch.testing.assert_close(fused, ws.grad)


def test_teacher_gets_no_gradient() -> None:
    hs, ws, ht, wt = tensors()
    ht.requires_grad_()
    wt.requires_grad_()
    fused_linear_jsd(hs, ws, ht, wt).backward()
    assert ht.grad is None
    assert wt.grad is None


def test_teacher_tensors_of_inference_mode_give_the_same_gradients() -> None:
    hs, ws, ht, wt = tensors()
    expected = torch.autograd.grad(fused_linear_jsd(hs, ws, ht, wt), (hs, ws))
    with torch.inference_mode():
        inferred = ht * 1.0
    torch.testing.assert_close(
        torch.autograd.grad(fused_linear_jsd(hs, ws, inferred, wt), (hs, ws)), expected
    )


def test_second_backward_pass_after_an_optimizer_step_is_refused() -> None:
    hs, ws, ht, wt = tensors()
    loss = fused_linear_jsd(hs, ws, ht, wt)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        ws.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_inputs_dtype_and_the_loss_at_least_float32(dtype: torch.dtype) -> None:
    hs, ws, ht, wt = tensors(dtype)
    loss = fused_linear_jsd(hs, ws, ht, wt)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {g.dtype for g in torch.autograd.grad(loss, (hs, ws))} == {dtype}


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float64, torch.float32),
    ],
    ids=["hidden below head", "head below hidden", "teacher below student", "teacher above student"],
)
def test_mixed_dtypes_equal_the_float64_reference(dtypes: tuple[torch.dtype, ...]) -> None:
    mixed = [t.detach().to(dtype) for t, dtype in zip(tensors(), dtypes, strict=True)]
    exact = [t.double() for t in mixed]
    for group in (mixed, exact):
        for leaf in group[:2]:
            leaf.requires_grad_()
    actual, expected = (
        fused_linear_jsd(*mixed, beta=0.3),
        fused_linear_jsd(*exact, beta=0.3, backend="reference"),
    )
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for g, w in zip(
        torch.autograd.grad(actual, mixed[:2]), torch.autograd.grad(expected, exact[:2]), strict=True
    ):
        torch.testing.assert_close(
            g, w.to(g.dtype), rtol=2**-7 if g.dtype == torch.bfloat16 else 1e-4, atol=1e-6
        )


def test_loss_under_autocast_equals_that_of_bfloat16_inputs() -> None:
    hs, ws, ht, wt = tensors()
    low = fused_linear_jsd(hs.bfloat16(), ws.bfloat16(), ht.bfloat16(), wt.bfloat16())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert fused_linear_jsd(hs, ws, ht, wt).item() == pytest.approx(low.item(), rel=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_pass_may_be_outside_autocast(reduction: Reduction) -> None:
    hs, ws, ht, wt = tensors()
    expected = torch.autograd.grad(fused_linear_jsd(hs, ws, ht, wt, reduction=reduction).sum(), (hs, ws))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = fused_linear_jsd(hs, ws, ht, wt, reduction=reduction).sum()
    for actual, true in zip(torch.autograd.grad(loss, (hs, ws)), expected, strict=True):
        assert (actual - true).norm() < 0.03 * true.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_body_and_loss_give_the_same_gradients(use_reentrant: bool) -> None:
    hs, _, ht, wt = tensors()
    torch.manual_seed(0)
    body, head = nn.Linear(DS, DS), nn.Linear(DS, V)

    def step(hidden: Tensor) -> Tensor:
        return fused_linear_jsd(body(hidden).tanh(), head.weight, ht, wt, student_bias=head.bias)

    parameters = [*body.parameters(), *head.parameters()]
    step(hs).backward()
    expected = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    loss = checkpoint(step, hs, use_reentrant=use_reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.testing.assert_close([p.grad for p in parameters], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_caller_compiled_with_inductor_gets_the_same_results(reduction: Reduction) -> None:
    hs, ws, ht, wt = tensors()

    def caller(hidden: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = fused_linear_jsd(hidden * 1.5, ws, ht, wt, reduction=reduction, return_stats=True)
        return (2 * loss).sum(), stats.reverse_kl + 1

    expected_loss, expected_stats = caller(hs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, stats = torch.compile(caller)(hs)
    torch.testing.assert_close((loss, stats), (expected_loss, expected_stats))
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hs, ws)), torch.autograd.grad(expected_loss, (hs, ws))
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_twice_is_refused(reduction: Reduction) -> None:
    hs, ws, ht, wt = tensors()
    loss = fused_linear_jsd(hs, ws, ht, wt, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, hs, create_graph=True)


def test_statistics_are_the_same_with_and_without_gradients() -> None:
    hs, ws, ht, wt = tensors()
    _, stats = fused_linear_jsd(hs, ws, ht, wt, return_stats=True)
    with torch.no_grad():
        _, alone = fused_linear_jsd(hs, ws, ht, wt, return_stats=True)
    assert all(torch.equal(a, b) for a, b in zip(stats[:5], alone[:5], strict=True))
    assert all(column.grad_fn is None for column in stats[:5])


def test_inputs_are_not_modified() -> None:
    inputs = tensors()
    before = [t.detach().clone() for t in inputs]
    fused_linear_jsd(*inputs).backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_module_can_be_copied_and_pickled(copied: Any) -> None:
    module = FusedLinearJSDLoss(beta=0.3, student_softcap=4.0)
    assert torch.equal(copied(module)(*tensors()), module(*tensors()))
