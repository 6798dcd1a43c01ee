"""The pool of ranks, on which the tests of vocabulary parallelism run, survives what one call does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from limits import seconds
from ranks import Ranks
from torch import distributed

pytestmark = [pytest.mark.skipif(INTERPRETED, reason="runs no kernel"), pytest.mark.xdist_group("forks")]


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


def echo(rank: int, word: str) -> tuple[int, str]:
    return rank, word


def sum_over_ranks(rank: int) -> float:
    total = torch.tensor(float(rank + 1))
    distributed.all_reduce(total)
    return total.item()


def rank_1_hangs(rank: int, word: str) -> str:
    if rank == 1:
        time.sleep(3600)
    return word


def rank_1_raises(rank: int) -> str:
    if rank == 1:
        raise KeyError("of rank 1")
    return "of rank 0"


def rank_1_ends(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def every_rank_raises(rank: int) -> None:
    raise ValueError(f"of rank {rank}")


def return_unpicklable(rank: int) -> Any:
    return lambda: None


def process_id(rank: int) -> int:
    return os.getpid()


def uninitialized_memory(rank: int) -> torch.Tensor:
    return torch.empty(3)


def test_each_rank_runs_the_function(pool: Ranks) -> None:
    assert pool(echo, "a") == [(0, "a"), (1, "a")]


def test_call_that_hangs_fails_alone(pool: Ranks) -> None:
    pool(echo, "the processes are up")
    pool.limit = 0.5
    with pytest.raises(TimeoutError, match="rank 1 gave no answer"):
        pool(rank_1_hangs, "late")
    pool.limit = seconds(120)
    assert pool(echo, "next") == [(0, "next"), (1, "next")]
    assert pool(sum_over_ranks) == [3.0, 3.0]


def test_exception_of_one_rank_is_raised_and_the_next_call_works(pool: Ranks) -> None:
    with pytest.raises(KeyError, match="of rank 1"):
        pool(rank_1_raises)
    assert pool(sum_over_ranks) == [3.0, 3.0]


def test_exception_of_every_rank_keeps_the_processes(pool: Ranks) -> None:
    before = pool(process_id)
    assert [str(error) for error in pool.outcomes(every_rank_raises)] == ["of rank 0", "of rank 1"]
    assert pool(process_id) == before


def test_process_that_ends_is_an_error_and_the_next_call_works(pool: Ranks) -> None:
    with pytest.raises(EOFError):
        pool(rank_1_ends)
    assert pool(sum_over_ranks) == [3.0, 3.0]


def test_result_that_cannot_be_pickled_is_an_error(pool: Ranks) -> None:
    with pytest.raises(Exception, match="pickle"):
        pool(return_unpicklable)


def test_uninitialized_memory_of_a_rank_is_nan(pool: Ranks) -> None:
    assert all(memory.isnan().all() for memory in pool(uninitialized_memory))
