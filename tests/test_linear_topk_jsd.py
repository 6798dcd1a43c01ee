"""The loss for a top-k teacher, on the backend under test, as test_properties.py does for the full one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BACKEND, HALF, INTERPRETED, TOPK, Case, topk_cases
from checks import (
    BETAS,
    assert_close,
    check_float32,
    check_float64,
    check_half,
    with_examples,
    with_few_examples,
)
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd
from fused_distill.chunked.teacher import TeacherRows
from fused_distill.config import LossSettings
from fused_distill.parallel.vocab_shard import Vocabulary
from fused_distill.rows.backend import topk_backend
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

TAILS = ["bucket", "renormalize", "truncate"]


def loss_of(case: Case, **options: Any) -> Tensor:
    return fused_linear_topk_jsd(
        *case.tensors, **case.per_token, **{**case.options, "backend": BACKEND, **options}
    )


def changed(case: Case, logprobs: Tensor, ids: Tensor) -> Case:
    """The case with another teacher, which may need more than the least workspace."""
    hs, ws, *_ = case.tensors
    options = {k: v for k, v in case.options.items() if k != "workspace_bytes"}
    return Case((hs, ws, logprobs, ids), case.per_token, options, TOPK)


def assert_same_answers(a: Case, b: Case, relative: float) -> None:
    left, right = a.answer(BACKEND), b.answer(BACKEND)
    for one, other in zip((left.loss, *left.grads), (right.loss, *right.grads), strict=True):
        assert_close(one, other, relative)


def small(k: int = 4, n: int = 5, vocab: int = 30, tail: str = "bucket", **options: Any) -> Case:
    """A student and the k likeliest tokens of a random teacher."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(2 * torch.randn(n, vocab, generator=generator), -1)
    hs, ws = torch.randn(n, 8, generator=generator), torch.randn(vocab, 8, generator=generator)
    top = logprobs.topk(k)
    return Case((hs, ws, top.values, top.indices), {}, {"tail": tail, **options}, TOPK)


@with_examples
@given(topk_cases())
def test_float32_is_as_exact_as_three_times_the_float32_reference(case: Case) -> None:
    check_float32(case)


@with_examples
@given(topk_cases())
def test_statistics_equal_the_oracle(case: Case) -> None:
    got, want = case.answer(BACKEND).stats, case.oracle().stats
    for name in got._fields:
        mine, true = getattr(got, name), getattr(want, name)
        if name == "top1_agreement":
            assert (mine == true).double().mean() > 0.9  # near ties may fall either way
        else:
            assert_close(mine, true, 1e-5, 1e-5)


@with_few_examples
@given(topk_cases(dtypes=HALF))
def test_half_inputs_are_rounded_once_at_the_end(case: Case) -> None:
    check_half(case)


@pytest.mark.skipif(INTERPRETED, reason="the kernels compute in float32")
@with_few_examples
@given(topk_cases(dtypes=(torch.float64,)))
def test_float64_inputs_are_computed_in_float64(case: Case) -> None:
    check_float64(case)


@pytest.mark.skipif(INTERPRETED, reason="the kernels compute in float32")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(tail: str, beta: float, reduction: str) -> None:
    case = small(n=3, tail=tail).to(torch.float64)
    hs, ws, logprobs, ids = case.tensors
    bias = torch.randn(len(ws), dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        options: dict[str, Any] = {"beta": beta, "tail": tail, "reduction": reduction, "temperature": 1.3}
        labels = torch.tensor([3, -100, 7])
        return fused_linear_topk_jsd(
            hidden, weight, logprobs, ids, student_bias=b, labels=labels, hard_weight=0.3, **options
        ) + fused_linear_topk_jsd(
            hidden, weight, logprobs, ids, student_bias=b, student_softcap=4.0, **options
        )

    assert torch.autograd.gradcheck(loss, (hs.requires_grad_(), ws.requires_grad_(), bias))


@with_few_examples
@given(topk_cases())
def test_chunking_changes_nothing_but_rounding(case: Case) -> None:
    whole = case.with_options(workspace_bytes=1 << 30)
    assert_same_answers(whole, case.with_options(workspace_bytes=case.least_workspace()), 1e-5)


@with_few_examples
@given(topk_cases())
def test_a_split_batch_with_one_normalizer_sums_to_the_whole(case: Case) -> None:
    hs, ws, logprobs, ids = case.tensors
    hs, logprobs, ids = (t.flatten(0, -2) for t in (hs, logprobs, ids))
    flat = {k: t if k.endswith("bias") else t.flatten() for k, t in case.per_token.items()}
    options = {**case.options, "reduction": "mean", "normalizer": torch.tensor(5.0)}
    half = len(hs) // 2

    def part(rows: slice) -> Tensor:
        per_token = {k: t if k.endswith("bias") else t[rows] for k, t in flat.items()}
        return loss_of(Case((hs[rows], ws, logprobs[rows], ids[rows]), per_token, options, TOPK))

    assert_close(part(slice(0, half)) + part(slice(half, None)), part(slice(None)), 1e-5)


@with_few_examples
@given(topk_cases())
def test_masked_tokens_may_hold_anything(case: Case) -> None:
    hs, ws, logprobs, ids = (t.clone() for t in case.tensors)
    mask = torch.arange(hs[..., 0].numel()).reshape(hs.shape[:-1]) % 2 == 0
    per_token = {**case.per_token, "mask": mask}
    clean = Case((hs, ws, logprobs, ids), per_token, case.options, TOPK)
    nan_hs, nan_logprobs = hs.clone(), logprobs.clone()
    nan_hs[~mask], nan_logprobs[~mask] = math.nan, math.nan
    any_ids = ids.clone()
    any_ids[~mask] = -100
    assert_same_answers(clean, Case((nan_hs, ws, nan_logprobs, any_ids), per_token, case.options, TOPK), 0.0)


@with_few_examples
@given(topk_cases())
def test_the_order_of_the_entries_does_not_matter(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    order = torch.randperm(ids.shape[-1], generator=torch.Generator().manual_seed(0))
    assert_same_answers(case, changed(case, logprobs[..., order], ids[..., order]), 1e-6)


@with_few_examples
@given(topk_cases())
def test_absent_entries_do_not_matter(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    more = torch.full_like(logprobs[..., :3], -math.inf), torch.full_like(ids[..., :3], 10**6)
    padded = changed(case, torch.cat([more[0], logprobs], -1), torch.cat([more[1], ids], -1))
    assert_same_answers(case, padded, 1e-6)


@with_few_examples
@given(topk_cases())
def test_a_repeated_id_counts_once(case: Case) -> None:
    _, _, logprobs, ids = case.tensors
    twice = changed(case, torch.cat([logprobs, logprobs], -1), torch.cat([ids, ids], -1))
    assert_same_answers(case, twice, 1e-6)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
def test_the_whole_vocabulary_as_support_equals_the_full_loss(tail: str, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(size, 8, generator=generator) for size in [5, 30, 5, 30])
    logprobs = torch.log_softmax(ht.double() @ wt.double().T, -1)
    ids = torch.stack([torch.randperm(30, generator=generator) for _ in range(5)])
    got = Case((hs, ws, logprobs.gather(-1, ids), ids), {}, {"tail": tail, "beta": beta}, TOPK).answer(
        BACKEND
    )
    want = Case((hs, ws, ht, wt), {}, {"beta": beta}).oracle()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-6)


@with_few_examples
@given(st.integers(0, 1000), st.integers(1, 30), st.sampled_from([*BETAS, 1e-3, 0.999]))
def test_the_bucket_loss_never_exceeds_the_full_one(seed: int, k: int, beta: float) -> None:
    # Data processing inequality: merging outcomes loses information.
    generator = torch.Generator().manual_seed(seed)
    hs, ws, ht, wt = (torch.randn(size, 8, generator=generator) for size in (5, 30, 5, 30))
    logprobs, ids = torch.log_softmax(ht.double() @ wt.double().T, -1).topk(k)
    part = fused_linear_topk_jsd(hs, ws, logprobs, ids, beta=beta, reduction="none", backend=BACKEND)
    whole = fused_linear_jsd(hs, ws, ht, wt, beta=beta, reduction="none", backend=BACKEND)
    assert (part <= whole * (1 + 1e-5) + 1e-6).all()  # the teacher's rest counts as 1e-7 at least


@with_few_examples
@given(topk_cases())
def test_bucket_and_renormalize_are_never_negative(case: Case) -> None:
    assume(case.options["tail"] != "truncate")
    plain = {k: t for k, t in case.per_token.items() if k != "labels"}
    case = Case(case.tensors, plain, {**case.options, "hard_weight": 0.0}, TOPK)
    assert (loss_of(case, reduction="none", normalizer=None, workspace_bytes=None) >= 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_token_without_entries_says_nothing(tail: str, beta: float) -> None:
    case = small(tail=tail, beta=beta)
    hs, ws, logprobs, ids = case.tensors
    answer = Case((hs, ws, torch.full_like(logprobs, -math.inf), ids), {}, case.options, TOPK).answer(BACKEND)
    assert answer.loss == 0
    assert all(g is not None and (g == 0).all() for g in answer.grads)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("how", ["empty", "masked"])
def test_no_token_at_all_gives_zero_and_zero_gradients(tail: str, how: str) -> None:
    case = small(n=0 if how == "empty" else 3, tail=tail)
    per_token = {"mask": torch.zeros(3, dtype=torch.bool)} if how == "masked" else {}
    got = Case(case.tensors, per_token, case.options, TOPK).answer(BACKEND)
    assert got.loss == 0
    assert all(g is not None and (g == 0).all() for g in got.grads)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-3])
def test_a_teacher_that_sums_to_slightly_more_than_one_is_fine(beta: float, excess: float) -> None:
    case = small(beta=beta)
    hs, ws, logprobs, ids = case.tensors
    logprobs = torch.log_softmax(logprobs, -1) + excess
    got = Case((hs, ws, logprobs, ids), {}, case.options, TOPK)
    assert_same_answers(got, changed(got, torch.log_softmax(logprobs, -1), ids), 1e-4)
    assert got.answer(BACKEND).loss.isfinite()


def test_the_largest_support_is_exact() -> None:
    case = small(k=4096, n=2, vocab=5000, beta=0.3)
    got, want = case.answer(BACKEND), case.oracle()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("rest", [1e-9, 1e-6, 1 - 1e-6])
@pytest.mark.parametrize("beta", BETAS)
def test_the_students_rest_keeps_its_digits_however_small(beta: float, rest: float) -> None:
    # Logits by an identity head: one named token, a hundred others that hold `rest` together.
    student = torch.full((1, 101), math.log(rest / (100 * (1 - rest))))
    student[0, 0] = 0.0
    case = Case(
        (student, torch.eye(101), torch.tensor([[math.log(0.9)]]), torch.tensor([[0]])),
        {},
        {"beta": beta},
        TOPK,
    )
    got, want = case.answer(BACKEND), case.oracle()
    assert_close(got.loss, want.loss, 1e-6, 0.0)
    assert_close(got.stats.student_mass, want.stats.student_mass, 1e-6, 0.0)
    assert_close(got.grads[0], want.grads[0], 1e-5, 0.0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4, 1e-5])
def test_close_models_keep_their_digits(tail: str, beta: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(2, 32000, generator=generator)
    student = teacher + noise * torch.randn(2, 32000, generator=generator)
    logprobs, ids = torch.log_softmax(teacher.double(), -1).float().topk(64)
    hidden = torch.eye(2)  # the head's columns are the logits, and no product rounds
    case = Case((hidden, student.T.contiguous(), logprobs, ids), {}, {"tail": tail, "beta": beta}, TOPK)
    # In float64 the fused loss, whose terms do not cancel, is a better oracle than the reference.
    exact = case.to(torch.float64).answer("torch")
    got = case.answer(BACKEND)
    assert_close(got.loss, exact.loss, 1e-3, 0.0)
    assert_close(got.grads[1], exact.grads[1], 1e-3, 0.0)


@pytest.mark.parametrize("beta", BETAS)
def test_renormalize_makes_no_product_over_the_vocabulary(beta: float) -> None:
    # Infinities outside the support would show in any product with it.
    case = small(tail="renormalize", beta=beta)
    hs, ws, logprobs, ids = case.tensors
    ids = ids % 20
    plain = Case((hs, ws, logprobs, ids), {}, case.options, TOPK).answer(BACKEND)
    ws = ws.clone()
    ws[20:] = math.nan
    got = Case((hs, ws, logprobs, ids), {}, case.options, TOPK).answer(BACKEND)
    for a, b in zip((got.loss, *got.grads), (plain.loss, *plain.grads), strict=True):
        assert_close(a, b, 0.0, 0.0)


def test_every_tail_runs_under_deterministic_algorithms() -> None:
    # torch raises where an operation has no deterministic way.
    case = small(n=40, k=8, tail="renormalize")
    torch.use_deterministic_algorithms(True)
    try:
        for tail in TAILS:
            assert_same_answers(case.with_options(tail=tail), case.with_options(tail=tail), 0.0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tail", TAILS)
def test_frozen_weight_gets_no_gradient_and_the_hidden_gradient_is_the_same(tail: str) -> None:
    case = small(tail=tail)
    trained = case.answer(BACKEND).grads[0]
    hs, ws, logprobs, ids = case.tensors
    hs.requires_grad_()
    fused_linear_topk_jsd(hs, ws, logprobs, ids, tail=tail, backend=BACKEND).backward()
    assert hs.grad is not None
    assert trained is not None
    assert torch.equal(hs.grad, trained)


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
def test_one_token_with_known_probabilities(tail: str, beta: float) -> None:
    student = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    case = Case(
        (student, torch.eye(3), torch.tensor([[math.log(0.75)]]), torch.tensor([[0]])),
        {},
        {"tail": tail, "beta": beta},
        TOPK,
    )
    assert loss_of(case).item() == pytest.approx(CLOSED_FORMS[tail, beta], abs=1e-7)


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = math.nan
    return tensor


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("where", ["student_hidden", "teacher_logprobs"])
def test_nan_is_not_hidden(tail: str, beta: float, where: str) -> None:
    case = small(tail=tail, beta=beta)
    hs, ws, logprobs, ids = case.tensors
    tensors = (
        (with_nan(hs), ws, logprobs, ids) if where == "student_hidden" else (hs, ws, with_nan(logprobs), ids)
    )
    got = Case(tensors, {}, case.options, TOPK).answer(BACKEND)
    assert got.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in got.grads)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("what", ["one of the support", "the whole rest", "most of the rest"])
def test_tokens_that_the_student_forbids_equal_the_oracle(tail: str, beta: float, what: str) -> None:
    # Not beta 0, whose loss is infinite where the teacher allows such a token.
    case = small(n=1, tail=tail, beta=beta)
    ids = case.tensors[3][0]
    rest = torch.tensor([v for v in range(30) if v not in ids])
    forbidden = {"one of the support": ids[1:2], "the whole rest": rest, "most of the rest": rest[1:]}[what]
    bias = torch.zeros(30).index_fill_(0, forbidden, -math.inf)
    case = Case(case.tensors, {"student_bias": bias}, case.options, TOPK)
    got, want = case.answer(BACKEND), case.oracle()
    assert got.loss.isfinite()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1e4, 1e3, 100.0])
def test_logits_of_any_size_equal_the_oracle(tail: str, beta: float, size: float) -> None:
    student = torch.tensor([[size, -size, 0.0, 1.0], [-size, -size, size, size], [0.0, size, 1.0, -size]])
    logprobs = torch.tensor([[0.0, -size], [-math.log(2), -math.log(2)], [-1e-3, -math.log(1e3)]])
    ids = torch.tensor([[1, 0], [2, 3], [1, 2]])
    case = Case((student, torch.eye(4), logprobs, ids), {}, {"tail": tail, "beta": beta}, TOPK)
    got, want = case.answer(BACKEND), case.oracle()
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, 1e-5)


@pytest.mark.parametrize("in_support", [True, False])
def test_the_labels_gradient_in_a_half_buffer_is_rounded_once(in_support: bool) -> None:
    # Half heads have a half logit gradient on a GPU, not on a CPU: hence the row step alone.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator)
    logits[:, 7] += 16  # a label that the student is sure of
    logprobs, ids = torch.log_softmax(torch.randn(64, 8, generator=generator).double(), -1), torch.arange(8)
    ids = (ids if in_support else ids + 100).expand(64, 8)
    settings = LossSettings(beta=0.5, temperature=1.5, hard_weight=1.0, soft_weight=0.3)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        name = "torch" if dtype == torch.float64 else backend
        rows = logits.to(torch.float64 if dtype == torch.float64 else torch.float32)
        grad = torch.empty(64, 1000, dtype=dtype)
        topk_backend(name, 1, False, tail="bucket", support_size=8, gathered=False).step(
            rows.clone(),
            TeacherRows(logprobs, ids=ids),
            torch.ones(64, dtype=rows.dtype),
            settings,
            student_bias=None,
            labels=torch.full((64,), 7),
            grad=grad,
            return_stats=False,
            block_rows=64,
            vocabulary=Vocabulary.whole(1000),
        )
        return grad.double()

    exact = gradient(torch.float64, BACKEND)
    assert_close(gradient(torch.bfloat16, BACKEND), exact, 2**-8, 0.0)
