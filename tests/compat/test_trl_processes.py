"""Training in two processes on the CPU gives the same with `patch_trl` as with TRL's own losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import INTERPRETED
from launching import launch, wait_for_output
from trl_cases import Run, assert_equal_runs
from trl_worker import SHARDED, STUDENTS, TEACHERS

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend"),
    pytest.mark.xdist_group("TRL processes"),  # trained once
]

Results = dict[str, dict[tuple[str, str], Run]]
EACH_TEACHER = pytest.mark.parametrize("teacher", TEACHERS)
TOLERANCE = {"local": 1e-5, "server": 1e-10}


@pytest.fixture(scope="module")
def ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Return what each process of trl_worker.py trained."""
    folder = tmp_path_factory.mktemp("trl")
    worker = Path(__file__).parents[1] / "helpers/trl_worker.py"
    process = launch("ddp", str(worker), str(tiny_model), str(folder))
    end = wait_for_output(process)
    assert process.returncode == 0, end
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@EACH_TEACHER
@pytest.mark.parametrize("student", STUDENTS)
def test_training_under_ddp_equals_trls(ranks: list[Results], teacher: str, student: str) -> None:
    for runs in ranks:
        assert_equal_runs(runs["ddp"][teacher, student], runs["trl"][teacher, student], TOLERANCE[teacher])


@EACH_TEACHER
@pytest.mark.parametrize("student", SHARDED)
def test_training_under_fsdp2_equals_ddp(ranks: list[Results], teacher: str, student: str) -> None:
    # TRL itself gives a head's shard the gradient of one rank's tokens alone.
    for runs in ranks:
        assert_equal_runs(runs["fsdp2"][teacher, student], runs["ddp"][teacher, student], TOLERANCE[teacher])


@EACH_TEACHER
@pytest.mark.parametrize("student", STUDENTS)
def test_parameters_are_equal_on_both_ranks(ranks: list[Results], teacher: str, student: str) -> None:
    one, two = (runs["ddp"][teacher, student] for runs in ranks)
    assert all(map(torch.equal, one.parameters, two.parameters))
