"""Properties of `fused_linear_topk_jsd` on the backend under test, "torch" or "triton"."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, HALF, TOPK, Case, close_logits, strided, topk_cases
from checks import (
    TAILS,
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
    for_each_tail_and_divergence,
    some_divergence,
    with_examples,
    with_few_examples,
)
from fused_distill import fused_linear_topk_jsd, reference
from fused_distill.config import Backend, Reduction, Tail, TopKLossConfig
from fused_distill.parallel.vocab_shard import ShardGroup
from fused_distill.rows.backend import make_row_loss
from fused_distill.rows.base import StudentRows, TeacherRows
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor


def with_teacher(case: Case, logprobs: Tensor, ids: Tensor) -> Case:
    """Return the case with another teacher, and without its workspace_bytes, which may be too small then."""
    hs, ws, *_ = case.tensors
    options = {k: v for k, v in case.options.items() if k != "workspace_bytes"}
    return replace(case, tensors=(hs, ws, logprobs, ids), options=options)


def at_tokens(case: Case, tokens: slice) -> Case:
    """Return some tokens of a case with one token dimension."""
    hs, ws, logprobs, ids = case.tensors
    keywords = {k: t if k.endswith("bias") else t[tokens] for k, t in case.keyword_tensors.items()}
    return replace(case, tensors=(hs[tokens], ws, logprobs[tokens], ids[tokens]), keyword_tensors=keywords)


def small(
    k: int = 4, n: int = 5, vocab: int = 30, tail: Tail = "bucket", ds: int = 8, **options: Any
) -> Case:
    """Return a random student with the k most likely tokens of a random teacher."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(2 * torch.randn(n, vocab, generator=generator), -1)
    hs, ws = torch.randn(n, ds, generator=generator), torch.randn(vocab, ds, generator=generator)
    top = logprobs.topk(k)
    return Case((hs, ws, top.values, top.indices), {}, {"tail": tail, **options}, TOPK)


@with_examples
@given(topk_cases())
def test_float32_error_is_at_most_three_times_the_float32_references(case: Case) -> None:
    check_float32(case)


@with_examples
@given(topk_cases())
def test_statistics_equal_the_oracle(case: Case) -> None:
    assert_stats_close(case.run(), case.oracle())


@with_few_examples
@given(topk_cases(dtypes=HALF))
def test_gradients_of_half_inputs_are_rounded_once(case: Case) -> None:
    check_half(case)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@with_few_examples
@given(topk_cases(dtypes=(torch.float64,)))
def test_float64_inputs_are_computed_in_float64(case: Case) -> None:
    check_float64(case)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@for_each_tail_and_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_pass_gradcheck(tail: Tail, divergence: dict[str, Any], reduction: Reduction) -> None:
    # gradcheck runs the loss twice for every entry of its inputs.
    case = small(n=3, vocab=9, ds=3, tail=tail).to(torch.float64)
    hs, ws, logprobs, ids = case.tensors
    bias = torch.randn(len(ws), dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        options: dict[str, Any] = {**divergence, "tail": tail, "reduction": reduction, "temperature": 1.3}
        labels = torch.tensor([3, -100, 7])
        return fused_linear_topk_jsd(
            hidden, weight, logprobs, ids, student_bias=b, labels=labels, hard_weight=0.3, **options
        ) + fused_linear_topk_jsd(
            hidden, weight, logprobs, ids, student_bias=b, student_softcap=4.0, **options
        )

    assert torch.autograd.gradcheck(loss, (hs.requires_grad_(), ws.requires_grad_(), bias))


@with_few_examples
@given(topk_cases())
def test_chunks_change_results_by_rounding_alone(case: Case) -> None:
    one_chunk = case.with_options(workspace_bytes=1 << 30).run()
    assert_results_close(case.with_options(workspace_bytes=case.min_workspace()).run(), one_chunk, 1e-5)


@with_few_examples
@given(topk_cases())
def test_losses_of_two_halves_with_one_normalizer_add_up(case: Case) -> None:
    hs, ws, logprobs, ids = case.tensors
    keywords = {k: t if k.endswith("bias") else t.flatten() for k, t in case.keyword_tensors.items()}
    tensors = (hs.flatten(0, -2), ws, logprobs.flatten(0, -2), ids.flatten(0, -2))
    case = replace(case, tensors=tensors, keyword_tensors=keywords)
    case = case.with_options(reduction="mean", normalizer=torch.tensor(5.0))
    half = len(tensors[0]) // 2
    parts = at_tokens(case, slice(0, half)).loss() + at_tokens(case, slice(half, None)).loss()
    assert_close(parts, case.loss(), 1e-5)


@with_few_examples
@given(topk_cases())
def test_masked_tokens_may_hold_anything(case: Case) -> None:
    hs, ws, logprobs, ids = (t.clone() for t in case.tensors)
    mask = torch.arange(hs[..., 0].numel()).reshape(hs.shape[:-1]) % 2 == 0
    case = replace(case, keyword_tensors={**case.keyword_tensors, "mask": mask})
    hs[~mask], logprobs[~mask] = math.nan, math.nan
    ids[~mask] = -100
    assert_results_equal(replace(case, tensors=(hs, ws, logprobs, ids)).run(), case.run())


@with_few_examples
@given(topk_cases())
def test_order_of_the_entries_does_not_matter(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    order = torch.randperm(ids.shape[-1], generator=torch.Generator().manual_seed(0))
    assert_results_close(with_teacher(case, logprobs[..., order], ids[..., order]).run(), case.run(), 1e-6)


@with_few_examples
@given(topk_cases())
def test_absent_entries_do_not_matter(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    absent = torch.full_like(logprobs[..., :3], -math.inf), torch.full_like(ids[..., :3], 10**6)
    padded = with_teacher(case, torch.cat([absent[0], logprobs], -1), torch.cat([absent[1], ids], -1))
    assert_results_close(padded.run(), case.run(), 1e-6)


@with_few_examples
@given(topk_cases())
def test_repeated_id_counts_once(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    repeated = with_teacher(case, torch.cat([logprobs, logprobs], -1), torch.cat([ids, ids], -1))
    assert_results_close(repeated.run(), case.run(), 1e-6)


@for_each_tail_and_divergence
def test_support_of_every_token_equals_the_full_loss(tail: Tail, divergence: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(size, 8, generator=generator) for size in [5, 30, 5, 30])
    logprobs = torch.log_softmax(ht.double() @ wt.double().T, -1)
    ids = torch.stack([torch.randperm(30, generator=generator) for _ in range(5)])
    result = Case((hs, ws, logprobs.gather(-1, ids), ids), {}, {"tail": tail, **divergence}, TOPK).run()
    assert_results_close(result, Case((hs, ws, ht, wt), {}, divergence).oracle(), 1e-6)


@with_few_examples
@given(st.integers(0, 1000), st.integers(1, 30), some_divergence)
def test_bucket_loss_never_exceeds_the_full_one(seed: int, k: int, divergence: dict[str, Any]) -> None:
    # Data processing inequality: merging outcomes loses information.
    generator = torch.Generator().manual_seed(seed)
    full = Case(
        (
            torch.randn(5, 8, generator=generator),
            torch.randn(30, 8, generator=generator),
            torch.randn(5, 8, generator=generator),
            torch.randn(30, 8, generator=generator),
        ),
        {},
        {**divergence, "reduction": "none"},
    )
    hs, ws, ht, wt = full.tensors
    logprobs, ids = torch.log_softmax(ht.double() @ wt.double().T, -1).topk(k)
    part = Case((hs, ws, logprobs, ids), {}, full.options, TOPK)
    # The teacher's tail counts as 1e-7 at least.
    assert (part.loss() <= full.loss() * (1 + 1e-5) + 1e-6).all()


@with_few_examples
@given(topk_cases())
def test_divergence_is_never_negative_but_for_truncate(case: Case) -> None:
    assume(case.options["tail"] != "truncate")
    options: dict[str, Any] = {"hard_weight": 0.0, "reduction": "none", "normalizer": None}
    assert (case.loss(**options, entry_clip=None, workspace_bytes=None) >= 0).all()


@for_each_tail_and_divergence
def test_token_without_entries_gives_zero_loss_and_gradients(tail: Tail, divergence: dict[str, Any]) -> None:
    case = small(tail=tail, **divergence)
    _, _, logprobs, ids = case.tensors
    assert_zero(with_teacher(case, torch.full_like(logprobs, -math.inf), ids).run())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tokens", ["none", "all masked"])
def test_no_valid_token_gives_zero_loss_and_gradients(tail: Tail, tokens: str) -> None:
    case = small(n=0 if tokens == "none" else 3, tail=tail)
    if tokens == "all masked":
        case = replace(case, keyword_tensors={"mask": torch.zeros(3, dtype=torch.bool)})
    assert_zero(case.run())


@pytest.mark.parametrize("tail", TAILS)
def test_no_valid_token_gives_zero_if_the_normalizer_is_zero(tail: Tail) -> None:
    case = replace(small(n=3, tail=tail), keyword_tensors={"mask": torch.zeros(3, dtype=torch.bool)})
    assert_zero(case.with_options(normalizer=torch.tensor(0)).run())


@for_each_divergence
@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-3])
def test_teacher_that_sums_to_slightly_more_than_one_is_normalized(
    divergence: dict[str, Any], excess: float
) -> None:
    case = small(**divergence)
    _, _, logprobs, ids = case.tensors
    normalized = torch.log_softmax(logprobs, -1)
    result = with_teacher(case, normalized + excess, ids).run()
    assert_results_close(result, with_teacher(case, normalized, ids).oracle(), 1e-4)


def test_support_of_4096_tokens_equals_the_oracle() -> None:
    case = small(k=4096, n=2, vocab=5000, beta=0.3)
    assert_results_close(case.run(), case.oracle(), 1e-5)


@pytest.mark.parametrize("student_tail", [1e-9, 1e-6, 1 - 1e-6])
@for_each_divergence
def test_tail_of_any_size_of_the_student_keeps_its_digits(
    divergence: dict[str, Any], student_tail: float
) -> None:
    # Logits by an identity head: one token of the support and a hundred of the tail.
    student = torch.full((1, 101), math.log(student_tail / (100 * (1 - student_tail))))
    student[0, 0] = 0.0
    case = Case(
        (student, torch.eye(101), torch.tensor([[math.log(0.9)]]), torch.tensor([[0]])),
        {},
        divergence,
        TOPK,
    )
    result, oracle = case.run(), case.oracle()
    assert_close(result.loss, oracle.loss, 1e-6, 0.0)
    assert_close(result.stats.student_mass, oracle.stats.student_mass, 1e-6, 0.0)
    assert_close(result.grads[0], oracle.grads[0], 1e-5, 0.0)


@for_each_tail_and_divergence
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4, 1e-5])
def test_close_models_keep_their_digits(tail: Tail, divergence: dict[str, Any], noise: float) -> None:
    student, teacher = close_logits(noise, vocab=32000)
    logprobs, ids = torch.log_softmax(teacher.double(), -1).float().topk(64)
    hidden = torch.eye(2)  # the head's columns are the logits, and no product rounds
    case = Case((hidden, student.T.contiguous(), logprobs, ids), {}, {"tail": tail, **divergence}, TOPK)
    result, oracle = case.run(), case.oracle()
    assert_close(result.loss, oracle.loss, 1e-3, 0.0)
    assert_close(result.grads[1], oracle.grads[1], 1e-3, 0.0)


@for_each_divergence
def test_renormalize_reads_no_head_row_outside_the_support(divergence: dict[str, Any]) -> None:
    # NaN outside the support would show in any product with it.
    case = small(tail="renormalize", **divergence)
    hs, ws, logprobs, ids = case.tensors
    case = with_teacher(case, logprobs, ids % 20)
    nan_ws = ws.clone()
    nan_ws[20:] = math.nan
    assert_results_equal(replace(case, tensors=(hs, nan_ws, logprobs, ids % 20)).run(), case.run())


@pytest.mark.parametrize("tail", TAILS)
def test_frozen_weight_gets_no_gradient_and_leaves_the_hidden_gradient_alone(tail: Tail) -> None:
    case = small(tail=tail)
    expected = case.run().grads[0]
    hs, ws, logprobs, ids = case.tensors
    hs.requires_grad_()
    fused_linear_topk_jsd(hs, ws, logprobs, ids, tail=tail, backend=BACKEND).backward()
    assert ws.grad is None
    assert hs.grad is not None
    assert expected is not None
    assert torch.equal(hs.grad, expected)


def transposed(tensor: Tensor) -> Tensor:
    """Return the same numbers, of which those of a column are contiguous."""
    return tensor.T.contiguous().T


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("layout", [transposed, strided])
@pytest.mark.parametrize("with_mask", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
def test_layout_of_the_tensors_does_not_matter(
    tail: Tail, layout: Callable[[Tensor], Tensor], with_mask: bool, backend: Backend
) -> None:
    case = small(tail=tail)
    mask = torch.tensor([True, True, False, True, True], device=DEVICE) if with_mask else None
    if mask is not None:
        case = replace(case, keyword_tensors={"mask": mask})
    hidden, weight, logprobs, ids = map(layout, case.tensors)
    assert hidden.stride(-1) > 1
    assert weight.stride(-1) > 1
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_topk_jsd(*leaves, logprobs, ids, mask=mask, tail=tail, backend=backend)
    assert isinstance(loss, Tensor)
    oracle = case.oracle()
    assert_close(loss, oracle.loss, 1e-5)
    for actual, expected in zip(torch.autograd.grad(loss, leaves), oracle.grads, strict=True):
        assert_close(actual, expected, 1e-5)


CLOSED_FORMS = {
    # Student 1/2, 1/4, 1/4; teacher 3/4 on the first token.
    ("bucket", 0.0): 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    ("bucket", 1.0): 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
    ("truncate", 0.0): 0.75 * math.log(1.5),
    ("truncate", 1.0): 0.5 * math.log(2 / 3),
    ("truncate", 0.5): 0.5 * 0.75 * math.log(0.75 / 0.625) + 0.5 * 0.5 * math.log(0.5 / 0.625),
    ("renormalize", 0.5): 0.0,
}


@pytest.mark.parametrize(("tail", "beta"), CLOSED_FORMS)
def test_loss_of_one_entry_equals_the_closed_form(tail: Tail, beta: float) -> None:
    student = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    case = Case(
        (student, torch.eye(3), torch.tensor([[math.log(0.75)]]), torch.tensor([[0]])),
        {},
        {"tail": tail, "beta": beta},
        TOPK,
    )
    assert case.loss().item() == pytest.approx(CLOSED_FORMS[tail, beta], abs=1e-7)


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = math.nan
    return tensor


@for_each_tail_and_divergence
@pytest.mark.parametrize("where", ["student_hidden", "teacher_logprobs"])
def test_nan_reaches_loss_and_gradients(tail: Tail, divergence: dict[str, Any], where: str) -> None:
    case = small(tail=tail, **divergence)
    hs, ws, logprobs, ids = case.tensors
    tensors = (
        (with_nan(hs), ws, logprobs, ids) if where == "student_hidden" else (hs, ws, with_nan(logprobs), ids)
    )
    result = Case(tensors, {}, case.options, TOPK).run()
    assert result.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in result.grads)


@for_each_tail_and_divergence
@pytest.mark.parametrize("what", ["one of the support", "the whole tail", "most of the tail"])
def test_token_forbidden_by_the_student_equals_the_oracle(
    tail: Tail, divergence: dict[str, Any], what: str
) -> None:
    options = finite_where_forbidden("student", divergence)
    if tail == "truncate" and "entry_clip" in options:
        pytest.skip("the loss is infinite")
    case = small(n=1, tail=tail, **options)
    ids = case.tensors[3][0]
    outside = torch.tensor([v for v in range(30) if v not in ids])
    forbidden = {"one of the support": ids[1:2], "the whole tail": outside, "most of the tail": outside[1:]}[
        what
    ]
    bias = torch.zeros(30).index_fill_(0, forbidden, -math.inf)
    case = Case(case.tensors, {"student_bias": bias}, case.options, TOPK)
    result = case.run()
    assert result.loss.isfinite()
    assert_results_close(result, case.oracle(), 1e-5)


@for_each_tail_and_divergence
@pytest.mark.parametrize("backend", sorted({BACKEND, "torch"}))
def test_softcap_bounds_the_logit_of_a_forbidden_token(
    tail: Tail, divergence: dict[str, Any], backend: str
) -> None:
    # More columns than a tile of the kernels, and fewer than two.
    case = small(n=2, vocab=3000, tail=tail, student_softcap=5.0, hard_weight=0.5, **divergence)
    bias = torch.zeros(3000)
    bias[::3] = -math.inf
    bias[case.tensors[3][:, 1]] = -math.inf
    case = replace(case, keyword_tensors={"student_bias": bias, "labels": torch.tensor([3, 2999])})
    result, oracle = case.run(backend), case.oracle()
    assert oracle.loss.isfinite()
    assert_results_close(result, oracle, 1e-5)
    assert_stats_close(result, oracle)


@for_each_tail_and_divergence
@pytest.mark.parametrize("size", [1e4, 1e3, 100.0])
def test_logits_of_any_size_equal_the_oracle(tail: Tail, divergence: dict[str, Any], size: float) -> None:
    student = torch.tensor([[size, -size, 0.0, 1.0], [-size, -size, size, size], [0.0, size, 1.0, -size]])
    logprobs = torch.tensor([[0.0, -size], [-math.log(2), -math.log(2)], [-1e-3, -math.log(1e3)]])
    ids = torch.tensor([[1, 0], [2, 3], [1, 2]])
    case = Case((student, torch.eye(4), logprobs, ids), {}, {"tail": tail, **divergence}, TOPK)
    assert_results_close(case.run(), case.oracle(), 1e-5)


@pytest.mark.parametrize("in_support", [True, False])
def test_label_gradient_in_a_half_buffer_is_rounded_once(in_support: bool) -> None:
    # A half head has a half logit gradient on a GPU, not on a CPU: hence the row step alone.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator)
    logits[:, 7] += 16  # a label that the student is sure of
    logprobs, ids = torch.log_softmax(torch.randn(64, 8, generator=generator).double(), -1), torch.arange(8)
    ids = (ids if in_support else ids + 100).expand(64, 8)
    labels = torch.full((64,), 7)
    logits, logprobs, ids, labels = (t.to(DEVICE) for t in (logits, logprobs, ids, labels))
    options: dict[str, Any] = {"beta": 0.5, "temperature": 1.5, "hard_weight": 1.0, "soft_weight": 0.3}

    grad = torch.empty(64, 1000, dtype=torch.bfloat16, device=DEVICE)
    config = TopKLossConfig(**options)
    make_row_loss("torch" if BACKEND == "cpp" else BACKEND, config, 8, DEVICE.type)(
        StudentRows(logits.clone(), torch.ones(64, device=DEVICE), labels=labels),
        TeacherRows(logprobs, ids=ids),
        config,
        grad=grad,
        group=ShardGroup(),
        block_rows=64,
    )

    exact_logits = logits.double().requires_grad_()
    head = torch.eye(1000, dtype=torch.float64, device=DEVICE)
    loss = reference.linear_topk_jsd(
        exact_logits, head, logprobs, ids, labels=labels, reduction="sum", **options
    )
    assert isinstance(loss, Tensor)
    assert_close(grad, torch.autograd.grad(loss, exact_logits)[0], 2**-8, 0.0)
