"""`fused_linear_topk_jsd` in training code: invalid arguments are named, contexts, number of products."""

# Type checkers would find most of these errors too.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import INTERPRETED
from checks import TAILS
from fused_distill import FusedLinearTopKJSDLoss, fused_linear_topk_jsd
from fused_distill.config import Backend, Tail
from test_contexts import Products
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about what every backend shares")

N, V, D, K = 3, 7, 4, 2


def valid() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logprobs, ids = torch.log_softmax(torch.randn(N, V, generator=generator), -1).topk(K)
    return {
        "student_hidden": torch.randn(N, D, generator=generator),
        "student_weight": torch.randn(V, D, generator=generator),
        "teacher_logprobs": logprobs,
        "teacher_ids": ids,
    }


INVALID = [
    ("tail", ValueError, {"tail": "drop"}),
    ("student_hidden", ValueError, {"student_hidden": torch.randn(N, D + 1)}),
    ("student_hidden", TypeError, {"student_hidden": torch.ones(N, D, dtype=torch.int64)}),
    ("teacher_logprobs", TypeError, {"teacher_logprobs": torch.ones(N, K, dtype=torch.int64)}),
    ("teacher_logprobs", TypeError, {"teacher_logprobs": [[0.0]]}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.zeros(N)}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.zeros(N + 1, K)}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.zeros(N, 0)}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.zeros(N, K, device="meta")}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.full((N, K), 0.5)}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.tensor([[-1.0, -2.0]] * 2 + [[3.0, -9.0]])}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.full((N, K), 0.6).log()}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.full((N, K), 0.6).log().bfloat16()}),
    ("teacher_logprobs", ValueError, {"teacher_logprobs": torch.full((N, K), 1000.0)}),
    ("teacher_ids", ValueError, {"teacher_ids": torch.zeros(N, K + 1, dtype=torch.int64)}),
    ("teacher_ids", TypeError, {"teacher_ids": torch.zeros(N, K)}),
    ("teacher_ids", ValueError, {"teacher_ids": torch.full((N, K), V)}),
    ("teacher_ids", ValueError, {"teacher_ids": torch.full((N, K), -1)}),
    ("teacher_ids", ValueError, {"teacher_ids": torch.full((N, K), 5), "vocab_size": 5}),
    ("vocab_size", ValueError, {"vocab_size": V + 1}),
    ("beta", ValueError, {"beta": 1.5}),
    ("temperature", ValueError, {"temperature": 0.0}),
    ("labels", ValueError, {"hard_weight": 0.5}),
    ("normalizer", ValueError, {"normalizer": 3.0, "reduction": "sum"}),
    ("workspace_bytes", ValueError, {"workspace_bytes": 1}),
    ("backend", ValueError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(
    ("name", "error", "change"), INVALID, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(INVALID)]
)
def test_invalid_argument_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{name} "):
        fused_linear_topk_jsd(**{**valid(), **change})


def test_ids_of_absent_entries_and_masked_tokens_do_not_matter() -> None:
    arguments = valid()
    arguments["teacher_logprobs"][0, 1] = -torch.inf
    mask = torch.tensor([True, True, False])
    expected = fused_linear_topk_jsd(**arguments, mask=mask)
    arguments["teacher_ids"][0, 1] = -100
    arguments["teacher_ids"][2] = 10**9
    assert fused_linear_topk_jsd(**arguments, mask=mask) == expected


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logits_in_place_of_log_probabilities_are_named(backend: Backend) -> None:
    arguments = valid() | {"teacher_logprobs": torch.tensor([[2.0, -1.0]] * N)}
    with pytest.raises(ValueError, match=r"^teacher_logprobs must not be above 0.*log_softmax.*, got 2"):
        fused_linear_topk_jsd(**arguments, backend=backend)


def test_log_probabilities_of_masked_tokens_and_repeated_ids_may_be_anything() -> None:
    arguments = valid()
    ids, logprobs = arguments["teacher_ids"], arguments["teacher_logprobs"]
    mask = torch.tensor([True, True, False])
    expected = fused_linear_topk_jsd(**arguments, mask=mask)
    arguments["teacher_ids"] = torch.cat([ids, ids], -1)
    arguments["teacher_logprobs"] = torch.cat([logprobs, logprobs * 0], -1)
    arguments["teacher_logprobs"][2] = 5.0
    assert torch.equal(fused_linear_topk_jsd(**arguments, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_log_probabilities_of_a_whole_vocabulary_are_accepted(dtype: torch.dtype) -> None:
    vocab = 20000
    logprobs = torch.log_softmax(torch.randn(2, vocab), -1).to(dtype)
    ids = torch.arange(vocab).expand(2, vocab)
    fused_linear_topk_jsd(torch.randn(2, D), torch.randn(vocab, D), logprobs, ids)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_vllms_number_for_a_forbidden_token_is_minus_infinity(
    tail: Tail, dtype: torch.dtype, backend: Backend
) -> None:
    arguments = valid()
    losses: list[Tensor] = []
    for forbidden in (-9999.0, -torch.inf):
        logprobs = arguments["teacher_logprobs"].masked_fill(torch.tensor([True, False]), forbidden)
        given = arguments | {"teacher_logprobs": logprobs.to(dtype)}
        losses.append(fused_linear_topk_jsd(**given, beta=1.0, tail=tail, backend=backend))
    assert torch.equal(*losses)
    assert losses[0] < 10


@pytest.mark.parametrize(
    ("options", "error"), [({"tail": "x"}, ValueError), ({"teacher_softcap": 3.0}, TypeError)]
)
def test_module_checks_its_options_at_construction(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        FusedLinearTopKJSDLoss(**options)


def test_module_passes_every_argument_on() -> None:
    tensors = {
        **valid(),
        "mask": torch.tensor([True, False, True]),
        "student_bias": torch.randn(V),
        "token_weight": torch.rand(N),
        "labels": torch.tensor([1, 2, -100]),
        "normalizer": 7.0,
    }
    options: dict[str, Any] = {"tail": "truncate", "beta": 0.2, "hard_weight": 0.3, "return_stats": True}
    actual, stats = FusedLinearTopKJSDLoss(**options)(**tensors)
    expected, expected_stats = fused_linear_topk_jsd(**tensors, **options)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
    assert "tail='truncate'" in repr(FusedLinearTopKJSDLoss(**options))


def grads(loss: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [arguments["student_hidden"], arguments["student_weight"]])


def trainable() -> dict[str, Any]:
    arguments = valid()
    for name in ("student_hidden", "student_weight"):
        arguments[name].requires_grad_()
    return arguments


@pytest.mark.parametrize("tail", TAILS)
def test_training_takes_three_products_or_none(tail: Tail) -> None:
    with Products() as seen:
        fused_linear_topk_jsd(**trainable(), tail=tail, backend="torch").backward()
    assert sorted(seen.shapes) == ([] if tail == "renormalize" else sorted([(N, D, V), (N, V, D), (V, N, D)]))


def test_renormalize_with_labels_projects_the_vocabulary() -> None:
    with Products() as seen:
        fused_linear_topk_jsd(
            **valid(), tail="renormalize", labels=torch.zeros(N, dtype=torch.int64), hard_weight=1.0
        )
    assert seen.shapes == [(N, D, V)]


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("context", ["checkpoint", "compile", "autocast", "none, twice"])
def test_training_contexts_give_the_same_gradients(tail: Tail, context: str) -> None:
    arguments = trainable()
    expected = grads(fused_linear_topk_jsd(**arguments, tail=tail), arguments)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        both = {"student_hidden": hidden * 1.0, "student_weight": weight}
        return fused_linear_topk_jsd(**{**arguments, **both}, tail=tail)

    inputs = arguments["student_hidden"], arguments["student_weight"]
    if context == "checkpoint":
        result: Any = checkpoint(loss, *inputs, use_reentrant=False)
    elif context == "compile":
        result = torch.compile(loss, backend="eager")(*inputs)
    elif context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            result = loss(*inputs)
    else:
        result = fused_linear_topk_jsd(**arguments, tail=tail, reduction="none")
        torch.autograd.grad(result.mean(), inputs, retain_graph=True)
        result = result.mean()
    torch.testing.assert_close(grads(result, arguments), expected)


@pytest.mark.parametrize("tail", TAILS)
def test_inputs_are_not_modified(tail: Tail) -> None:
    arguments = trainable()
    arguments["teacher_logprobs"][1, 0] = -torch.inf
    before = {name: t.detach().clone() for name, t in arguments.items()}
    fused_linear_topk_jsd(**arguments, tail=tail).backward()
    assert all(torch.equal(t, before[name]) for name, t in arguments.items())


def test_teacher_tensors_of_inference_mode_give_the_same_gradients() -> None:
    arguments = trainable()
    expected = grads(fused_linear_topk_jsd(**arguments), arguments)
    with torch.inference_mode():
        arguments["teacher_logprobs"] = arguments["teacher_logprobs"] * 1.0
        arguments["teacher_ids"] = arguments["teacher_ids"] + 0
    torch.testing.assert_close(grads(fused_linear_topk_jsd(**arguments), arguments), expected)


def test_int32_ids_equal_int64_ones() -> None:
    arguments = valid()
    expected = fused_linear_topk_jsd(**arguments)
    assert fused_linear_topk_jsd(**{**arguments, "teacher_ids": arguments["teacher_ids"].int()}) == expected
