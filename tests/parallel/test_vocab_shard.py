"""Vocabulary parallelism: heads sharded over 2 and 4 processes give what unsharded heads give, on every rank.

Results are compared with the float64 reference on unsharded heads, and where that is not enough with the same
backend on unsharded heads too.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, INTERPRETED, TOPK, Case, LossResult, cases, close_logits, topk_cases
from checks import (
    BETAS,
    TAILS,
    assert_as_exact_as_float32,
    assert_close,
    assert_results_close,
    assert_rounded_once,
    assert_stats_close,
    assert_zero,
    finite_where_forbidden,
    for_each_divergence,
    some_divergence,
)
from fused_distill import (
    FusedLinearJSDLoss,
    FusedLinearTopKJSDLoss,
    fused_linear_jsd,
    fused_linear_topk_jsd,
)
from fused_distill.chunked import memory as chunked_memory
from fused_distill.chunked import tensors as loss_tensors
from fused_distill.chunked import workspace
from fused_distill.chunked.workspace import plan_chunks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from long_double import divergence_rows
from ranks import Ranks
from test_close_models import TOLERANCE
from test_workspace import PeakMemory
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

pytestmark = pytest.mark.xdist_group("forks")

with_examples = settings(max_examples=6 if INTERPRETED else 50)
with_few_examples = settings(max_examples=2 if INTERPRETED else 25)


def shard_of(case: Case, rank: int, cuts: list[int]) -> Case:
    """Return the case of one rank. Its shard ends at the next cut, that of the last rank at the end."""
    rows = slice(cuts[rank], cuts[rank + 1] if rank + 2 < len(cuts) else None)
    hs, ws, ht, wt = case.tensors
    wt, ht = (wt[rows], ht) if case.functions != TOPK else (wt, ht)
    keyword_tensors = {k: t[rows] if k.endswith("bias") else t for k, t in case.keyword_tensors.items()}
    return replace(case, tensors=(hs, ws[rows], ht, wt), keyword_tensors=keyword_tensors).with_options(
        process_group=distributed.group.WORLD
    )


def result_of_rank(rank: int, case: Case, cuts: list[int], backend: str) -> LossResult:
    return shard_of(case, rank, cuts).run(backend)


def run(pool: Ranks, case: Case, cuts: list[int]) -> LossResult:
    """Return the result of all ranks together, having checked that it is the same on each."""
    results = pool(result_of_rank, case, cuts, BACKEND)
    first = results[0]
    for other in results[1:]:
        torch.testing.assert_close(other.loss, first.loss, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(other.stats, first.stats, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(other.grads[0], first.grads[0], rtol=0, atol=0, equal_nan=True)
    by_rank = zip(*(result.grads[1:] for result in results), strict=True)
    return LossResult(first.loss, first.stats, (first.grads[0], *(torch.cat(shards) for shards in by_rank)))


def even_cuts(case: Case, ranks: int) -> list[int]:
    vocab = len(case.tensors[1])
    return [vocab * rank // ranks for rank in range(ranks + 1)]


def uneven_cuts(case: Case) -> list[int]:
    """Return the boundaries of two shards, the first of which is the smaller."""
    vocab = len(case.tensors[1])
    return [0, vocab * 9 // 32, vocab]


def assert_same(result: LossResult, expected: LossResult, relative: float, absolute: float = 1e-6) -> None:
    """Compare losses, gradients and statistics."""
    assert_results_close(result, expected, relative, absolute)
    assert_stats_close(result, expected, relative, absolute)


@st.composite
def cut_cases(draw: st.DrawFn, case: st.SearchStrategy[Case]) -> tuple[int, Case, list[int]]:
    """Draw a number of ranks, a case, and any shard boundaries in its vocabulary."""
    drawn = draw(case)
    ranks = 2 if INTERPRETED else draw(st.sampled_from([2, 4]))
    rows = [len(drawn.tensors[1])] if drawn.functions == TOPK else [len(drawn.tensors[i]) for i in (1, 3)]
    compared = drawn.options["vocab_size"] or min(rows)
    assume(compared >= ranks)
    places = st.integers(1, compared - 1)
    cuts = draw(st.lists(places, min_size=ranks - 1, max_size=ranks - 1, unique=True))
    return ranks, drawn, [0, *sorted(cuts), compared]


@with_examples
@given(cut=cut_cases(st.one_of(cases(), topk_cases())))
def test_float32_error_is_at_most_three_times_the_float32_references(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]
) -> None:
    ranks, case, cuts = cut
    result = run(pools[ranks], case, cuts)
    assert_as_exact_as_float32(result, case)
    assert_same(result, case.run(), 1e-4, 1e-5)


@pytest.mark.skipif(BACKEND == "triton", reason="the kernels compute in float32")
@with_examples
@given(cut=cut_cases(st.one_of(cases((torch.float64,)), topk_cases((torch.float64,)))))
def test_float64_inputs_are_computed_in_float64(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]
) -> None:
    ranks, case, cuts = cut
    assert_same(run(pools[ranks], case, cuts), case.oracle(), 1e-10, 1e-12)


@with_few_examples
@given(cut=cut_cases(st.one_of(cases((torch.bfloat16,)), topk_cases((torch.bfloat16,)))))
def test_gradients_of_half_inputs_are_rounded_once(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]
) -> None:
    ranks, case, cuts = cut
    assert_rounded_once(run(pools[ranks], case, cuts), case.oracle())


def random_case(rows: int = 30, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((7, 8), (rows, 8), (7, 6), (rows, 6))]
    return Case((tensors[0], tensors[1], tensors[2], tensors[3]), {}, options)


def random_topk_case(k: int = 4, rows: int = 30, **options: Any) -> Case:
    hs, ws, ht, wt = random_case(rows=rows).tensors
    top = torch.log_softmax(ht @ wt.T, -1).topk(k)
    return Case((hs, ws, top.values, top.indices), {}, options, TOPK)


@for_each_divergence
@pytest.mark.parametrize("noise", [1e-2, 1e-5])
def test_close_models_keep_their_digits(two: Ranks, noise: float, divergence: dict[str, Any]) -> None:
    student, teacher = close_logits(noise)
    hidden = torch.eye(2)  # the heads' columns are the logits, and no product rounds
    heads = student.T.contiguous(), teacher.T.contiguous()
    case = Case((hidden, heads[0], hidden, heads[1]), {}, {**divergence, "reduction": "none"})
    result = run(two, case, uneven_cuts(case))
    losses, grads = divergence_rows(student, teacher, **divergence)
    factors = torch.tensor([[1.0], [2.0]])  # of Case.run
    assert_close(result.loss, losses, TOLERANCE[noise], 0.0)
    assert_close(result.grads[1], (factors * grads).T, TOLERANCE[noise], 0.0)
    for kl, kl_beta in ((result.stats.forward_kl, 0.0), (result.stats.reverse_kl, 1.0)):
        assert_close(kl, divergence_rows(student, teacher, beta=kl_beta)[0], TOLERANCE[noise], 0.0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("noise", TOLERANCE)
def test_close_models_keep_their_digits_at_k_tokens(two: Ranks, noise: float, tail: str) -> None:
    student, teacher = close_logits(noise)
    top = torch.log_softmax(teacher.double(), -1).float().topk(64)
    case = Case(
        (torch.eye(2), student.T.contiguous(), top.values, top.indices), {}, {"tail": tail, "beta": 0.5}, TOPK
    )
    result, oracle = run(two, case, uneven_cuts(case)), case.oracle()
    assert_close(result.loss, oracle.loss, 1e-3, 0.0)
    assert_close(result.grads[1], oracle.grads[1], 1e-3, 0.0)


@with_few_examples
@given(cut=cut_cases(cases()), divergence=some_divergence)
def test_identical_models_give_exactly_zero(
    pools: dict[int, Ranks], cut: tuple[int, Case, list[int]], divergence: dict[str, Any]
) -> None:
    ranks, case, cuts = cut
    hs, ws, *_ = case.tensors
    case = Case((hs, ws, hs, ws), {}, {**divergence, "temperature": case.options["temperature"]})
    assert_zero(run(pools[ranks], case, cuts))


@with_few_examples
@given(cut=cut_cases(cases()))
def test_divergence_is_never_negative(pools: dict[int, Ranks], cut: tuple[int, Case, list[int]]) -> None:
    ranks, case, cuts = cut
    case = case.with_options(hard_weight=0.0, reduction="none", normalizer=None, entry_clip=None)
    assert (run(pools[ranks], case, cuts).loss >= 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tokens", ["none", "all masked"])
@pytest.mark.parametrize("make", [random_case, random_topk_case])
def test_no_valid_token_gives_zero_loss_and_gradients(
    two: Ranks, make: Any, tokens: str, beta: float
) -> None:
    case = make(beta=beta)
    hs, ws, a, b = case.tensors
    if tokens == "none":
        case = replace(case, tensors=(hs[:0], ws, a[:0], b if make is random_case else b[:0]))
    else:
        case = replace(case, keyword_tensors={"mask": torch.zeros(7, dtype=torch.bool)})
    assert_zero(run(two, case, even_cuts(case, 2)))


@for_each_divergence
@pytest.mark.parametrize("who", ["both", "teacher", "student"])
def test_rank_whose_tokens_are_all_forbidden_gives_the_unsharded_result(
    two: Ranks, who: str, divergence: dict[str, Any]
) -> None:
    forbidden = torch.zeros(30)
    forbidden[:11] = -torch.inf
    forbidden[20] = -torch.inf
    case = random_case(**(divergence if who == "both" else finite_where_forbidden(who, divergence)))
    models = ("student", "teacher") if who == "both" else (who,)
    case = replace(case, keyword_tensors={f"{model}_bias": forbidden for model in models})
    # The reference's gradient is NaN where the student forbids a token.
    result, expected = run(two, case, [0, 11, 30]), case.run() if who != "teacher" else case.oracle()
    assert expected.loss.isfinite()
    assert_results_close(result, expected, 1e-5)
    assert_close(result.stats.student_entropy, expected.stats.student_entropy, 1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", [slice(0, 10), slice(20, 30)])
def test_rank_without_an_id_of_the_teacher_gives_the_unsharded_result(
    two: Ranks, support: slice, beta: float, tail: str
) -> None:
    case = random_topk_case(tail=tail, beta=beta)
    hs, ws, logprobs, _ = case.tensors
    ids = torch.arange(30)[support][:4].expand(7, 4)
    labels = torch.tensor([0, 12, 29, -100, 5, 22, 14])
    case = replace(case, tensors=(hs, ws, logprobs, ids))
    assert_same(run(two, case, [0, 14, 30]), case.oracle(), 1e-5)
    case = replace(case, keyword_tensors={"labels": labels}).with_options(hard_weight=0.5, temperature=1.5)
    assert_same(run(two, case, [0, 14, 30]), case.oracle(), 1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_student_that_forbids_all_tokens_of_a_rank_gives_the_unsharded_result(two: Ranks, tail: str) -> None:
    case = random_topk_case(tail=tail)
    bias = torch.zeros(30)
    bias[14:] = -torch.inf
    case = replace(case, keyword_tensors={"student_bias": bias})
    hs, ws, logprobs, _ = case.tensors
    case = replace(case, tensors=(hs, ws, logprobs, torch.arange(4).expand(7, 4)))
    assert_same(run(two, case, [0, 14, 30]), case.oracle(), 1e-5)


@pytest.mark.parametrize("make", [random_case, random_topk_case])
@pytest.mark.parametrize("index", [0, 1])
def test_nan_of_one_rank_reaches_loss_and_gradients_of_all(two: Ranks, index: int, make: Any) -> None:
    case = make()
    case.tensors[index][0, 0] = torch.nan
    result = run(two, case, even_cuts(case, 2))
    assert result.loss.isnan()
    assert all(g is not None and g.isnan().any() for g in result.grads)


def min_workspace_of_rank(rank: int, case: Case, cuts: list[int]) -> int:
    return shard_of(case, rank, cuts).min_workspace()


def reductions_of_rank(rank: int, case: Case, cuts: list[int]) -> tuple[list[str], int]:
    """Return the collectives of a call with its gradients, and its number of chunks."""
    plans, called = [], []

    def spied(name: str) -> Any:
        original = getattr(distributed, name)

        def spy(*args: Any, **options: Any) -> Any:
            called.append(name)
            return original(*args, **options)

        return mock.patch.object(distributed, name, spy)

    def plan(*args: Any, **options: Any) -> Any:
        plans.append(plan_chunks(*args, **options))
        return plans[-1]

    with spied("all_reduce"), spied("all_gather"), mock.patch.object(chunked_memory, "plan_chunks", plan):
        shard_of(case, rank, cuts).run()
    (planned,) = plans
    return called, len(list(planned.chunks()))


@pytest.mark.parametrize(
    ("case", "per_chunk"),
    [
        (random_case(beta=0.0), ["all_gather"] if BACKEND == "triton" else 3 * ["all_reduce"]),
        (random_case(beta=0.5), ["all_gather", "all_reduce"] if BACKEND == "triton" else 3 * ["all_reduce"]),
        (random_topk_case(tail="bucket"), 2 * ["all_reduce"]),
        (random_topk_case(tail="truncate"), 2 * ["all_reduce"]),
        (random_topk_case(tail="renormalize"), ["all_reduce"]),
    ],
)
def test_number_of_reductions_per_chunk_is_fixed(two: Ranks, case: Case, per_chunk: list[str]) -> None:
    cuts = [0, 2, 30]
    case = case.with_options(workspace_bytes=two(min_workspace_of_rank, case, cuts)[0])
    (first, n_chunks), (second, _) = two(reductions_of_rank, case, cuts)
    assert n_chunks == 7
    assert first == second == ["all_gather", *per_chunk * n_chunks, "all_reduce"]


@pytest.mark.parametrize("case", [random_case(), random_topk_case()])
def test_smallest_workspace_is_the_same_on_all_ranks(two: Ranks, case: Case) -> None:
    minimum, *others = two(min_workspace_of_rank, case, [0, 2, 30])
    assert others == [minimum]
    assert_same(run(two, case.with_options(workspace_bytes=minimum), [0, 2, 30]), case.oracle(), 1e-5)


def peak_of_rank(rank: int, case: Case, cuts: list[int]) -> int:
    """Return the bytes at the peak, without gradients and inputs."""
    case = shard_of(case, rank, cuts)
    hs, ws, *teacher = case.tensors
    hs, ws = hs.requires_grad_(), ws.requires_grad_()
    with PeakMemory([hs, ws, *teacher, *case.keyword_tensors.values()]) as memory:
        case.functions[0](hs, ws, *teacher, **case.keyword_tensors, **case.options, backend="torch")
    return memory.peak - 4 * (hs.numel() + ws.numel())


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's temporaries")
@pytest.mark.parametrize("workspace_bytes", [4 << 20, 16 << 20])
@pytest.mark.parametrize("tail", [None, *TAILS])
def test_every_rank_stays_within_its_workspace(two: Ranks, tail: str | None, workspace_bytes: int) -> None:
    n, vocab = 300, 3000
    hs, ws, ht, wt = (torch.randn(size, 16) for size in (n, vocab, n, vocab))
    options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "return_stats": True}
    keyword_tensors = {"labels": torch.arange(n)}
    options["hard_weight"] = 0.0 if tail == "renormalize" else 0.5
    if tail is None:
        case = Case((hs, ws, ht, wt), keyword_tensors, options)
    else:
        top = torch.log_softmax(ht @ wt.T, -1).topk(64)
        case = Case((hs, ws, top.values, top.indices), keyword_tensors, {**options, "tail": tail}, TOPK)
    checked_ids = 0 if tail is None else 8 * 64 * n
    for peak in two(peak_of_rank, case, [0, 700, vocab]):
        assert peak <= workspace_bytes + checked_ids + 64 * n


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's backends")
@pytest.mark.parametrize("case", [random_case(beta=0.3), random_topk_case(beta=0.3)])
def test_pytorch_rows_on_all_ranks_equal_the_oracle(two: Ranks, case: Case) -> None:
    case = replace(case, keyword_tensors={"labels": torch.tensor([0, 12, 29, -100, 5, 22, 14])})
    case = case.with_options(hard_weight=0.5, temperature=1.5, student_softcap=6.0)
    case = case.with_options(workspace_bytes=3 * case.min_workspace("torch"))
    results = two(result_of_rank, case, [0, 11, 30], "torch")
    oracle = case.oracle()
    hidden_grad, weight_grad = oracle.grads
    assert weight_grad is not None
    for result, (start, end) in zip(results, pairwise([0, 11, 30]), strict=True):
        assert_same(result, oracle._replace(grads=(hidden_grad, weight_grad[start:end])), 1e-5)


def repeated_gradients_of_rank(rank: int, case: Case, cuts: list[int]) -> list[tuple[Tensor, ...]]:
    case = shard_of(case, rank, cuts)
    hs, ws, *teacher = case.tensors
    leaves = hs.requires_grad_(), ws.requires_grad_()
    loss = case.functions[0](*leaves, *teacher, **case.options, backend=BACKEND).sum()
    return [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_pass_gives_the_same_gradients(two: Ranks, reduction: str) -> None:
    for first, second in two(repeated_gradients_of_rank, random_case(reduction=reduction), [0, 11, 30]):
        torch.testing.assert_close(first, second)


def forward_only_of_rank(rank: int, case: Case, cuts: list[int]) -> Tensor:
    case = shard_of(case, rank, cuts)
    with torch.no_grad():
        return case.functions[0](*case.tensors, **case.options, backend=BACKEND)


def test_loss_without_gradients_equals_the_oracle(two: Ranks) -> None:
    case = random_case()
    for loss in two(forward_only_of_rank, case, [0, 11, 30]):
        assert loss.item() == pytest.approx(case.oracle().loss.item(), rel=1e-5)


def strided_of_rank(rank: int, case: Case, cuts: list[int]) -> Tensor:
    hs, *others = shard_of(case, rank, cuts).tensors
    columns = hs.T.contiguous().T.requires_grad_()
    loss = fused_linear_jsd(columns, *others, backend=BACKEND, process_group=distributed.group.WORLD)
    return torch.autograd.grad(loss, columns)[0]


def test_gradient_of_strided_hidden_states_equals_the_oracle(two: Ranks) -> None:
    case = random_case()
    for grad in two(strided_of_rank, case, [0, 11, 30]):
        assert_close(grad, case.oracle().grads[0], 1e-5)


def modules_of_rank(rank: int, case: Case, topk: Case, cuts: list[int]) -> tuple[Tensor, Tensor]:
    group = distributed.group.WORLD
    full = FusedLinearJSDLoss(beta=0.3, process_group=group, backend=BACKEND)
    few = FusedLinearTopKJSDLoss(beta=0.3, process_group=group, backend=BACKEND)
    return full(*shard_of(case, rank, cuts).tensors), few(*shard_of(topk, rank, cuts).tensors)


def test_modules_take_the_group_at_construction(two: Ranks) -> None:
    case, topk = random_case(beta=0.3), random_topk_case(beta=0.3)
    for full, few in two(modules_of_rank, case, topk, [0, 11, 30]):
        assert full.item() == pytest.approx(case.oracle().loss.item(), rel=1e-5)
        assert few.item() == pytest.approx(topk.oracle().loss.item(), rel=1e-5)


def error_of_rank(rank: int, kind: str) -> None:
    case = shard_of(random_case(), rank, [0, 11, 30])
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
    reason = "no compiler" if kind == "compiler" and rank == 1 else None
    if kind == "compiler":
        options["backend"] = "auto"
    uses_onednn = kind == "product" and rank == 1
    with (
        mock.patch.object(loss_tensors, "why_unavailable", return_value=reason),
        mock.patch.object(workspace, "use_onednn", return_value=uses_onednn),
    ):
        fused_linear_jsd(hs, ws, ht, wt, **options)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("boundaries", ValueError, "^teacher_weight must be sharded .* at the same rows as student_weight"),
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
        ("reference", ValueError, "^process_group does not go with"),
        ("compiler", ValueError, r"^whether the rows are computed in C\+\+ must be the same .* got \[1, 0\]"),
        (
            "product",
            ValueError,
            "^whether oneDNN multiplies, which FUSED_DISTILL_CPU_PRODUCT decides",
        ),
        ("DTensor", TypeError, "^student_weight must be an ordinary tensor .* DTensor"),
    ],
)
def test_invalid_call_is_refused_on_every_rank(
    two: Ranks, kind: str, error: type[Exception], message: str
) -> None:
    for outcome in two.outcomes(error_of_rank, kind):
        with pytest.raises(error, match=message):
            raise outcome


@pytest.mark.parametrize("group", ["WORLD", -100, 2])
def test_process_group_of_another_type_is_refused(group: Any) -> None:
    for call in (fused_linear_jsd, fused_linear_topk_jsd):
        with pytest.raises(
            TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"
        ):
            call(*random_case().tensors, process_group=group)
    with pytest.raises(TypeError, match="process_group"):
        FusedLinearJSDLoss(process_group=group)


def tensor_parallel_of_rank(rank: int, case: Case, cut_tokens: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of a head under torch's tensor parallelism and of this rank's hidden states."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    hs, ws, ht, wt = case.tensors
    model: Any = nn.ModuleDict({"s": nn.Linear(8, 31, bias=False), "t": nn.Linear(6, 31, bias=False)})
    model.load_state_dict({"s.weight": ws, "t.weight": wt})
    parallelize_module(model, mesh, {"s": ColwiseParallel(), "t": ColwiseParallel()})
    tokens = slice(4 * mesh.get_local_rank(), 4 + 3 * mesh.get_local_rank()) if cut_tokens else slice(None)
    local_hidden = hs[tokens].requires_grad_()
    placement = Shard(0) if cut_tokens else Replicate()
    hidden = DTensor.from_local(local_hidden, mesh, [placement], shape=hs.shape, stride=hs.stride())
    loss = fused_linear_jsd(
        hidden.full_tensor() if cut_tokens else hidden.to_local(),
        model["s"].weight.to_local(),
        ht,
        model["t"].weight.to_local(),
        process_group=mesh.get_group(),
    )
    loss.backward()
    assert local_hidden.grad is not None
    return model["s"].weight.grad.full_tensor(), local_hidden.grad


@pytest.mark.skipif(INTERPRETED, reason="about what happens around the loss")
@pytest.mark.parametrize("cut_tokens", [False, True])
def test_gradients_under_torchs_tensor_parallelism_equal_the_oracle(
    pools: dict[int, Ranks], cut_tokens: bool
) -> None:
    # Two groups of two ranks.
    case = random_case(rows=31)
    hidden_grad, weight_grad = case.oracle().grads
    assert hidden_grad is not None
    for rank, (weight, hidden) in enumerate(pools[4](tensor_parallel_of_rank, case, cut_tokens)):
        assert_close(weight, weight_grad, 1e-5)
        tokens = [slice(0, 4), slice(4, 7)][rank % 2] if cut_tokens else slice(None)
        assert_close(hidden, hidden_grad[tokens], 1e-5)
