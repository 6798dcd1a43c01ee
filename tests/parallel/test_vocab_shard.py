"""Heads cut over the vocabulary of 2 and 4 processes: what the whole heads give, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, INTERPRETED, TOPK, Answer, Case, cases, topk_cases
from checks import BETAS, assert_as_exact_as_float32, assert_close
from fused_distill import (
    FusedLinearJSDLoss,
    FusedLinearTopKJSDLoss,
    fused_linear_jsd,
    fused_linear_topk_jsd,
    reference,
    topk_logprobs,
)
from fused_distill.chunked import loop as _engine
from fused_distill.chunked import workspace as _plan
from fused_distill.rows import backend as _backends
from fused_distill.rows import compiled as _stages
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_close_models import ALLOWED, close_logits
from test_workspace import PeakMemory
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

TAILS = ["bucket", "renormalize", "truncate"]
with_examples = settings(max_examples=6 if INTERPRETED else 50)
with_few_examples = settings(max_examples=2 if INTERPRETED else 25)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    sizes = [2] if INTERPRETED else [2, 4]
    pools = {size: Ranks(size) for size in sizes}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def two(pools: dict[int, Ranks]) -> Ranks:
    return pools[2]


def block_of(case: Case, rank: int, cuts: list[int]) -> Case:
    """The case of one rank, whose head ends at the next cut; the last rank's goes to the end."""
    rows = slice(cuts[rank], cuts[rank + 1] if rank + 2 < len(cuts) else None)
    hs, ws, ht, wt = case.tensors
    wt, ht = (wt[rows], ht) if case.losses != TOPK else (wt, ht)
    per_token = {k: t[rows] if k.endswith("bias") else t for k, t in case.per_token.items()}
    return replace(case, tensors=(hs, ws[rows], ht, wt), per_token=per_token).with_options(
        process_group=distributed.group.WORLD
    )


def answer_of_rank(rank: int, case: Case, cuts: list[int], backend: str) -> Answer:
    return block_of(case, rank, cuts).answer(backend)


def answer(pool: Ranks, case: Case, cuts: list[int]) -> Answer:
    """What the ranks answer together, having seen that all answer the same."""
    answers = pool(answer_of_rank, case, cuts, BACKEND)
    first = answers[0]
    for other in answers[1:]:
        assert torch.equal(other.loss, first.loss) or first.loss.isnan().any()
        torch.testing.assert_close(other.stats, first.stats, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(other.grads[0], first.grads[0], rtol=0, atol=0, equal_nan=True)
    by_rank = zip(*(a.grads[1:] for a in answers), strict=True)
    return Answer(first.loss, first.stats, (first.grads[0], *(torch.cat(blocks) for blocks in by_rank)))


def even_cuts(case: Case, ranks: int) -> list[int]:
    vocab = len(case.tensors[1])
    return [vocab * rank // ranks for rank in range(ranks + 1)]


def assert_same_gradients(got: Answer, want: Answer, relative: float, absolute: float = 1e-6) -> None:
    for mine, true in zip((got.loss, *got.grads), (want.loss, *want.grads), strict=True):
        assert_close(mine, true, relative, absolute)


def assert_same(got: Answer, want: Answer, relative: float, absolute: float = 1e-6) -> None:
    assert_same_gradients(got, want, relative, absolute)
    for name in want.stats._fields:
        mine, true = getattr(got.stats, name), getattr(want.stats, name)
        if name == "top1_agreement":
            assert (mine == true).double().mean() > 0.9  # near ties may fall either way
        else:
            assert_close(mine, true, relative, absolute)


@st.composite
def cut_cases(draw: st.DrawFn, case: st.SearchStrategy[Case]) -> tuple[int, Case, list[int]]:
    """A number of ranks, a case, and any cuts of its vocabulary."""
    drawn = draw(case)
    ranks = 2 if INTERPRETED else draw(st.sampled_from([2, 4]))
    rows = [len(drawn.tensors[1])] if drawn.losses == TOPK else [len(drawn.tensors[i]) for i in (1, 3)]
    compared = drawn.options["vocab_size"] or min(rows)
    assume(compared >= ranks)
    places = st.integers(1, compared - 1)
    cuts = draw(st.lists(places, min_size=ranks - 1, max_size=ranks - 1, unique=True))
    return ranks, drawn, [0, *sorted(cuts), compared]


@with_examples
@given(cut=cut_cases(st.one_of(cases(), topk_cases())))
def test_float32_is_as_exact_as_three_times_the_float32_reference(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]
) -> None:
    ranks, case, cuts = cut
    got = answer(pools[ranks], case, cuts)
    assert_as_exact_as_float32(got, case)
    assert_same(got, case.answer(BACKEND), 1e-4, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="the kernels compute in float32")
@with_examples
@given(cut=cut_cases(st.one_of(cases((torch.float64,)), topk_cases((torch.float64,)))))
def test_float64_equals_the_whole_heads(pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]) -> None:
    ranks, case, cuts = cut
    assert_same(answer(pools[ranks], case, cuts), case.answer(BACKEND), 1e-10, 1e-12)


@with_few_examples
@given(cut=cut_cases(st.one_of(cases((torch.bfloat16,)), topk_cases((torch.bfloat16,)))))
def test_half_inputs_are_rounded_once_at_the_end(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]
) -> None:
    ranks, case, cuts = cut
    got, want = answer(pools[ranks], case, cuts), case.oracle()
    assert_close(got.loss, want.loss, 1e-5, 1e-5)
    for mine, true in zip(got.grads, want.grads, strict=True):
        assert mine is not None
        assert true is not None
        assert mine.dtype == torch.bfloat16
        rounded = (true.to(mine.dtype).double() - true).norm().item()
        assert_close(mine, true, 1e-5, 1.1 * rounded + 1e-6)


def random_case(rows: int = 30, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((7, 8), (rows, 8), (7, 6), (rows, 6))]
    return Case((tensors[0], tensors[1], tensors[2], tensors[3]), {}, options)


def random_topk_case(k: int = 4, rows: int = 30, **options: Any) -> Case:
    hs, ws, ht, wt = random_case(rows=rows).tensors
    top = torch.log_softmax(ht @ wt.T, -1).topk(k)
    return Case((hs, ws, top.values, top.indices), {}, options, TOPK)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("noise", ALLOWED)
def test_close_models_keep_their_digits(two: Ranks, noise: float, beta: float) -> None:
    student, teacher = close_logits(noise)
    hidden = torch.eye(2)  # the heads' columns are the logits, and no product rounds
    heads = student.T.contiguous(), teacher.T.contiguous()
    case = Case((hidden, heads[0], hidden, heads[1]), {}, {"beta": beta, "reduction": "sum"})
    got, exact = answer(two, case, [0, 9000, 32000]), case.to(torch.float64).answer("torch")
    assert_close(got.loss, exact.loss, ALLOWED[noise], 0.0)
    assert_close(got.grads[1], exact.grads[1], ALLOWED[noise], 0.0)
    for mine, true in zip(got.stats[2:4], exact.stats[2:4], strict=True):
        assert_close(mine, true, ALLOWED[noise], 0.0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("noise", ALLOWED)
def test_close_models_keep_their_digits_at_k_tokens(two: Ranks, noise: float, tail: str) -> None:
    student, teacher = close_logits(noise)
    top = torch.log_softmax(teacher.double(), -1).float().topk(64)
    case = Case(
        (torch.eye(2), student.T.contiguous(), top.values, top.indices), {}, {"tail": tail, "beta": 0.5}, TOPK
    )
    got, exact = answer(two, case, [0, 9000, 32000]), case.to(torch.float64).answer("torch")
    assert_close(got.loss, exact.loss, 1e-3, 0.0)
    assert_close(got.grads[1], exact.grads[1], 1e-3, 0.0)


@with_few_examples
@given(cut=cut_cases(cases()), beta=st.sampled_from(BETAS))
def test_identical_models_give_exactly_nothing(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]], beta: float
) -> None:
    ranks, case, cuts = cut
    hs, ws, *_ = case.tensors
    case = Case((hs, ws, hs, ws), {}, {"beta": beta, "temperature": case.options["temperature"]})
    got = answer(pools[ranks], case, cuts)
    assert got.loss == 0
    assert all(g is not None and (g == 0).all() for g in got.grads)


@with_few_examples
@given(cut=cut_cases(cases()))
def test_the_divergence_is_never_negative(pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]) -> None:
    ranks, case, cuts = cut
    case = replace(case, per_token={k: t for k, t in case.per_token.items() if k != "labels"})
    case = case.with_options(hard_weight=0.0, reduction="none", normalizer=None)
    assert (answer(pools[ranks], case, cuts).loss >= 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("how", ["empty", "masked"])
@pytest.mark.parametrize("make", [random_case, random_topk_case])
def test_no_token_at_all_gives_zero_and_zero_gradients(two: Ranks, make: Any, how: str, beta: float) -> None:
    case = make(beta=beta)
    hs, ws, a, b = case.tensors
    if how == "empty":
        case = replace(case, tensors=(hs[:0], ws, a[:0], b if make is random_case else b[:0]))
    else:
        case = replace(case, per_token={"mask": torch.zeros(7, dtype=torch.bool)})
    got = answer(two, case, even_cuts(case, 2))
    assert got.loss == 0
    assert all(g is not None and (g == 0).all() for g in got.grads)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("who", ["both", "teacher", "student"])
def test_a_rank_whose_tokens_are_all_forbidden(two: Ranks, who: str, beta: float) -> None:
    if (who, beta) in (("teacher", 1.0), ("student", 0.0)):
        pytest.skip("the divergence is infinite")
    forbidden = torch.zeros(30)
    forbidden[:11] = -torch.inf
    forbidden[20] = -torch.inf
    case = random_case(beta=beta)
    models = ("student", "teacher") if who == "both" else (who,)
    case = replace(case, per_token={f"{model}_bias": forbidden for model in models})
    got, want = answer(two, case, [0, 11, 30]), case.answer(BACKEND)
    assert want.loss.isfinite()
    assert_same_gradients(got, want, 1e-5)
    assert_close(got.stats.student_entropy, want.stats.student_entropy, 1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("held", [slice(0, 10), slice(20, 30)])
def test_a_rank_in_which_no_id_of_the_teacher_falls(two: Ranks, held: slice, beta: float, tail: str) -> None:
    case = random_topk_case(tail=tail, beta=beta)
    hs, ws, logprobs, _ = case.tensors
    ids = torch.arange(30)[held][:4].expand(7, 4)
    labels = torch.tensor([0, 12, 29, -100, 5, 22, 14])
    case = replace(case, tensors=(hs, ws, logprobs, ids))
    assert_same(answer(two, case, [0, 14, 30]), case.answer(BACKEND), 1e-5)
    case = replace(case, per_token={"labels": labels}).with_options(hard_weight=0.5, temperature=1.5)
    assert_same(answer(two, case, [0, 14, 30]), case.answer(BACKEND), 1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_forbids_everything_outside_one_rank(two: Ranks, tail: str) -> None:
    case = random_topk_case(tail=tail)
    bias = torch.zeros(30)
    bias[14:] = -torch.inf
    case = replace(case, per_token={"student_bias": bias})
    hs, ws, logprobs, _ = case.tensors
    case = replace(case, tensors=(hs, ws, logprobs, torch.arange(4).expand(7, 4)))
    assert_same(answer(two, case, [0, 14, 30]), case.answer(BACKEND), 1e-5)


@pytest.mark.parametrize("make", [random_case, random_topk_case])
@pytest.mark.parametrize("index", [0, 1])
def test_nan_of_one_rank_is_seen_on_all(two: Ranks, index: int, make: Any) -> None:
    case = make()
    case.tensors[index][0, 0] = torch.nan
    got = answer(two, case, even_cuts(case, 2))
    assert got.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in got.grads)


def least_of_rank(rank: int, case: Case, cuts: list[int]) -> int:
    return block_of(case, rank, cuts).least_workspace()


def reductions_of_rank(rank: int, case: Case, cuts: list[int]) -> tuple[list[str], int]:
    """The collectives of a call with its gradients, and its number of chunks."""
    plans, called = [], []

    def spied(name: str) -> Any:
        original = getattr(distributed, name)

        def spy(*args: Any, **options: Any) -> Any:
            called.append(name)
            return original(*args, **options)

        return mock.patch.object(distributed, name, spy)

    def plan(*args: Any, **options: Any) -> Any:
        plans.append(_plan.plan_chunks(*args, **options))
        return plans[-1]

    with spied("all_reduce"), spied("all_gather"), mock.patch.object(_engine, "plan_chunks", plan):
        block_of(case, rank, cuts).answer(BACKEND)
    (planned,) = plans
    return called, len(list(planned.chunks()))


@pytest.mark.parametrize(
    ("case", "per_chunk"),
    [
        (random_case(beta=0.0), 3),
        (random_case(beta=0.5), 3),
        (random_topk_case(tail="bucket"), 2),
        (random_topk_case(tail="truncate"), 2),
        (random_topk_case(tail="renormalize"), 1),
    ],
)
def test_a_chunk_takes_few_reductions_on_ranks_of_any_size(two: Ranks, case: Case, per_chunk: int) -> None:
    cuts = [0, 2, 30]
    case = case.with_options(workspace_bytes=two(least_of_rank, case, cuts)[0])
    (first, n_chunks), (second, _) = two(reductions_of_rank, case, cuts)
    assert n_chunks == 7
    assert first == second == ["all_gather"] + ["all_reduce"] * (per_chunk * n_chunks + 1)


@pytest.mark.parametrize("case", [random_case(), random_topk_case()])
def test_too_small_a_workspace_is_refused_on_all_ranks_alike(two: Ranks, case: Case) -> None:
    least = two(least_of_rank, case, [0, 2, 30])
    assert len(set(least)) == 1
    got = answer(two, case.with_options(workspace_bytes=least[0]), [0, 2, 30])
    assert_same(got, case.answer(BACKEND), 1e-5)


def peak_of_rank(rank: int, case: Case, cuts: list[int]) -> int:
    """Bytes at the peak, gradients and the inputs apart."""
    case = block_of(case, rank, cuts)
    hs, ws, *teacher = case.tensors
    hs, ws = hs.requires_grad_(), ws.requires_grad_()
    with PeakMemory([hs, ws, *teacher, *case.per_token.values()]) as memory:
        case.losses[0](hs, ws, *teacher, **case.per_token, **case.options, backend="torch")
    return memory.peak - 4 * (hs.numel() + ws.numel())


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's temporaries")
@pytest.mark.parametrize("workspace_bytes", [4 << 20, 16 << 20])
@pytest.mark.parametrize("tail", [None, *TAILS])
def test_every_rank_stays_within_its_workspace(two: Ranks, tail: str | None, workspace_bytes: int) -> None:
    n, vocab = 300, 3000
    hs, ws, ht, wt = (torch.randn(size, 16) for size in (n, vocab, n, vocab))
    options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "return_stats": True}
    per_token = {"labels": torch.arange(n)}
    options["hard_weight"] = 0.0 if tail == "renormalize" else 0.5
    if tail is None:
        case = Case((hs, ws, ht, wt), per_token, options)
    else:
        top = torch.log_softmax(ht @ wt.T, -1).topk(64)
        case = Case((hs, ws, top.values, top.indices), per_token, {**options, "tail": tail}, TOPK)
    checked_ids = 0 if tail is None else 8 * 64 * n
    for peak in two(peak_of_rank, case, [0, 700, vocab]):
        assert peak <= workspace_bytes + checked_ids + 64 * n


def broken(*args: Any) -> Any:
    raise RuntimeError("no C++ compiler")


def compiled_answer_of_rank(rank: int, case: Case, cuts: list[int], broken_rank: int | None) -> Answer:
    compiled = _stages.compiled_stage
    calls = []

    def stage(function: Any) -> Any:
        calls.append(function)
        return broken if rank == broken_rank and len(calls) > 1 else compiled(function)

    with (
        mock.patch.object(_backends, "_COMPILE_MIN_LOGITS", 1),
        mock.patch.object(_stages, "compiled_stage", stage),
        mock.patch.object(_stages.Compiler, "works", True),
    ):
        result = block_of(case, rank, cuts).answer("torch")
        assert calls
        assert _stages.Compiler.works == (rank != broken_rank)
    return result


@pytest.mark.skipif(INTERPRETED, reason="about torch.compile")
@pytest.mark.parametrize("broken_rank", [None, 1])
@pytest.mark.filterwarnings("ignore:fused_distill. torch.compile failed")
@pytest.mark.parametrize("case", [random_case(beta=0.3), random_topk_case(beta=0.3)])
def test_compiled_rows_on_all_ranks_or_on_some(two: Ranks, case: Case, broken_rank: int | None) -> None:
    case = replace(case, per_token={"labels": torch.tensor([0, 12, 29, -100, 5, 22, 14])})
    case = case.with_options(hard_weight=0.5, temperature=1.5, student_softcap=6.0)
    case = case.with_options(workspace_bytes=3 * case.least_workspace())
    answers = two(compiled_answer_of_rank, case, [0, 11, 30], broken_rank)
    want = case.answer("torch")
    for got, (start, end) in zip(answers, pairwise([0, 11, 30]), strict=True):
        assert want.grads[1] is not None
        assert_same(got, want._replace(grads=(want.grads[0], want.grads[1][start:end])), 1e-5)


def repeated_of_rank(rank: int, case: Case, cuts: list[int]) -> list[tuple[Tensor, ...]]:
    case = block_of(case, rank, cuts)
    hs, ws, *teacher = case.tensors
    leaves = hs.requires_grad_(), ws.requires_grad_()
    loss = case.losses[0](*leaves, *teacher, **case.options, backend=BACKEND).sum()
    return [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_gives_the_same_gradients(two: Ranks, reduction: str) -> None:
    for first, second in two(repeated_of_rank, random_case(reduction=reduction), [0, 11, 30]):
        torch.testing.assert_close(first, second)


def forward_only_of_rank(rank: int, case: Case, cuts: list[int]) -> Tensor:
    case = block_of(case, rank, cuts)
    with torch.no_grad():
        return case.losses[0](*case.tensors, **case.options, backend=BACKEND)


def test_without_gradients_the_loss_is_the_same(two: Ranks) -> None:
    case = random_case()
    for loss in two(forward_only_of_rank, case, [0, 11, 30]):
        assert loss.item() == pytest.approx(case.answer(BACKEND).loss.item(), rel=1e-5)


def strided_of_rank(rank: int, case: Case, cuts: list[int]) -> Tensor:
    hs, *others = block_of(case, rank, cuts).tensors
    columns = hs.T.contiguous().T.requires_grad_()
    loss = fused_linear_jsd(columns, *others, backend=BACKEND, process_group=distributed.group.WORLD)
    return torch.autograd.grad(loss, columns)[0]


def test_strided_hidden_states_get_the_same_gradient(two: Ranks) -> None:
    case = random_case()
    for got in two(strided_of_rank, case, [0, 11, 30]):
        assert_close(got, case.answer(BACKEND).grads[0], 1e-5)


def modules_of_rank(rank: int, case: Case, topk: Case, cuts: list[int]) -> tuple[Tensor, Tensor]:
    group = distributed.group.WORLD
    full = FusedLinearJSDLoss(beta=0.3, process_group=group, backend=BACKEND)
    few = FusedLinearTopKJSDLoss(beta=0.3, process_group=group, backend=BACKEND)
    return full(*block_of(case, rank, cuts).tensors), few(*block_of(topk, rank, cuts).tensors)


def test_the_modules_take_the_group_at_construction(two: Ranks) -> None:
    case, topk = random_case(beta=0.3), random_topk_case(beta=0.3)
    for full, few in two(modules_of_rank, case, topk, [0, 11, 30]):
        assert full.item() == pytest.approx(case.answer(BACKEND).loss.item(), rel=1e-5)
        assert few.item() == pytest.approx(topk.answer(BACKEND).loss.item(), rel=1e-5)


def error_of_rank(rank: int, kind: str) -> None:
    case = block_of(random_case(), rank, [0, 11, 30])
    hs, ws, ht, wt = case.tensors
    options: dict[str, Any] = {**case.options, "backend": BACKEND}
    if kind == "boundaries":
        wt = random_case().tensors[3][: [15, 15][rank]]
    elif kind == "vocab_size":
        options["vocab_size"] = 31
    elif kind == "a rank without rows":
        options["vocab_size"] = 11
    elif kind == "tokens":
        hs, ht = hs[rank:], ht[rank:]
    elif kind == "mask":
        options["mask"] = torch.arange(7) <= rank
    elif kind == "gradients":
        ws = ws.requires_grad_(rank == 1)
    elif kind == "workspace":
        options["workspace_bytes"] = (1 + rank) << 20
    elif kind == "labels":
        options |= {"labels": torch.full((7,), 30), "hard_weight": 0.5}
    elif kind == "reference":
        options["backend"] = "reference"
    elif kind == "DTensor":
        mesh = init_device_mesh("cpu", (2,))
        ws = DTensor.from_local(ws, mesh, [Shard(0)])
    fused_linear_jsd(hs, ws, ht, wt, **options)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("boundaries", ValueError, "^teacher_weight must be cut .* at the rows at which student_weight"),
        ("vocab_size", ValueError, "^vocab_size must not exceed .* got 31 with 30"),
        (
            "a rank without rows",
            ValueError,
            r"rows of student_weight below vocab_size, got \[\(0, 11\), \(11, 11\)\]",
        ),
        ("tokens", ValueError, r"student_hidden and mask, must be the same on every rank .* got \[7, 6\]"),
        ("mask", ValueError, r"student_hidden and mask, must be the same on every rank .* got \[1, 2\]"),
        (
            "gradients",
            ValueError,
            r"^whether student_weight requires a gradient must be the same .* got \[0, 1\]",
        ),
        ("workspace", ValueError, "^workspace_bytes must be the same"),
        ("labels", ValueError, r"^labels must be in \[0, 30\)"),
        ("reference", ValueError, "^process_group goes with"),
        ("DTensor", TypeError, "^student_weight must be an ordinary tensor .* DTensor"),
    ],
)
def test_a_bad_call_is_refused_on_every_rank(
    two: Ranks, kind: str, error: type[Exception], message: str
) -> None:
    for outcome in two.outcomes(error_of_rank, kind):
        with pytest.raises(error, match=message):
            raise outcome


@pytest.mark.parametrize("group", ["WORLD", -100, 2])
def test_what_is_no_process_group_is_refused(group: Any) -> None:
    for call in (fused_linear_jsd, fused_linear_topk_jsd):
        with pytest.raises(
            TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"
        ):
            call(*random_case().tensors, process_group=group)
    with pytest.raises(TypeError, match="process_group"):
        FusedLinearJSDLoss(process_group=group)


def tensor_parallel_of_rank(rank: int, case: Case, cut_tokens: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a head under torch's tensor parallelism and of this rank's hidden states."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    hs, ws, ht, wt = case.tensors
    model: Any = nn.ModuleDict({"s": nn.Linear(8, 31, bias=False), "t": nn.Linear(6, 31, bias=False)})
    model.load_state_dict({"s.weight": ws, "t.weight": wt})
    parallelize_module(model, mesh, {"s": ColwiseParallel(), "t": ColwiseParallel()})
    tokens = slice(4 * mesh.get_local_rank(), 4 + 3 * mesh.get_local_rank()) if cut_tokens else slice(None)
    mine = hs[tokens].requires_grad_()
    placement = Shard(0) if cut_tokens else Replicate()
    hidden = DTensor.from_local(mine, mesh, [placement], shape=hs.shape, stride=hs.stride())
    loss = fused_linear_jsd(
        hidden.full_tensor() if cut_tokens else hidden.to_local(),
        model["s"].weight.to_local(),
        ht,
        model["t"].weight.to_local(),
        process_group=mesh.get_group(),
    )
    loss.backward()
    assert mine.grad is not None
    return model["s"].weight.grad.full_tensor(), mine.grad


@pytest.mark.skipif(INTERPRETED, reason="about what happens around the loss")
@pytest.mark.parametrize("cut_tokens", [False, True])
def test_models_under_torchs_tensor_parallelism(pools: dict[int, Ranks], cut_tokens: bool) -> None:
    # Two groups of two ranks.
    case = random_case(rows=31)
    want = case.answer(BACKEND).grads
    assert want[0] is not None
    for rank, (weight, hidden) in enumerate(pools[4](tensor_parallel_of_rank, case, cut_tokens)):
        assert_close(weight, want[1], 1e-5)
        mine = want[0][[slice(0, 4), slice(4, 7)][rank % 2]] if cut_tokens else want[0]
        assert_close(hidden, mine, 1e-5)


# FSDP2: every rank has tokens of its own and a part of each parameter.


def sharded_head(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(rows + columns)
    head = nn.Linear(columns, rows)
    fully_shard(head)
    return head


def tokens_of_rank(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    hs, ht = torch.randn(7 + rank, 8, generator=generator), torch.randn(7 + rank, 6, generator=generator)
    return hs.requires_grad_(), ht


def whole_gradients(head: nn.Linear) -> list[Tensor]:
    """The gradients of a sharded head, put together; they were in shards."""
    found = []
    for parameter in (head.weight, head.bias):
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.placements == (Shard(0),)
        found.append(parameter.grad.full_tensor())
    return found


def fsdp_step_of_rank(rank: int, ours: bool, reduction: str) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and gathers of one step: our loss, or the head's own forward and plain PyTorch."""
    student, teacher = sharded_head(31, 8), sharded_head(31, 6)
    hs, ht = tokens_of_rank(rank)
    options: dict[str, Any] = {"beta": 0.3, "reduction": reduction}
    heads = [student.weight, student.bias, teacher.weight, teacher.bias]
    with CommDebugMode() as communication:
        if ours:
            ws, bs, wt, bt = heads
            loss = fused_linear_jsd(
                hs, ws, ht, wt, student_bias=bs, teacher_bias=bt, workspace_bytes=1 << 15, **options
            )
        else:
            one = torch.eye(31)
            loss = reference.linear_jsd(student(hs), one, teacher(ht), one, **options)
        gathers = sum(n for name, n in communication.get_comm_counts().items() if "gather" in str(name))
    assert isinstance(loss, Tensor)
    loss.sum().backward()
    assert hs.grad is not None
    return loss.detach(), [hs.grad, *whole_gradients(student)], gathers


@pytest.mark.skipif(INTERPRETED, reason="about what happens before any kernel")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_under_fsdp_train_as_their_own_forward_does(two: Ranks, reduction: str) -> None:
    fused, plain = (two(fsdp_step_of_rank, ours, reduction) for ours in (True, False))
    for (loss, grads, gathers), (want_loss, want_grads, _) in zip(fused, plain, strict=True):
        torch.testing.assert_close((loss, grads), (want_loss, want_grads))
        assert gathers == 4  # two weights and two biases, however many chunks


def topk_fsdp_of_rank(rank: int) -> tuple[Any, ...]:
    student, teacher = sharded_head(31, 8), sharded_head(31, 6)
    hs, ht = tokens_of_rank(rank)
    with CommDebugMode() as communication:
        top = topk_logprobs(ht, teacher.weight, 5, bias=teacher.bias)
        loss = fused_linear_topk_jsd(hs, student.weight, *top[:2], student_bias=student.bias)
    loss.backward()
    whole = [t.detach().full_tensor() for t in (student.weight, student.bias, teacher.weight, teacher.bias)]  # pyright: ignore[reportAttributeAccessIssue]
    return loss.detach(), whole_gradients(student), whole, communication.get_total_counts()


@pytest.mark.skipif(INTERPRETED, reason="about what happens before any kernel")
def test_top_k_losses_and_log_probabilities_take_sharded_heads(two: Ranks) -> None:
    results = two(topk_fsdp_of_rank)
    ws, bs, wt, bt = results[0][2]
    losses, leaves = [], (ws.requires_grad_(), bs.requires_grad_())
    for rank in range(2):
        hs, ht = tokens_of_rank(rank)
        top = topk_logprobs(ht, wt, 5, bias=bt)
        losses.append(fused_linear_topk_jsd(hs, ws, *top[:2], student_bias=bs))
    want = torch.autograd.grad((losses[0] + losses[1]) / 2, leaves)
    for (loss, grads, _, n_collectives), want_loss in zip(results, losses, strict=True):
        torch.testing.assert_close((loss, tuple(grads)), (want_loss.detach(), want))
        assert n_collectives == 4
