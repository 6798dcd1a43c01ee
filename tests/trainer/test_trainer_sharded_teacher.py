"""A local teacher that FSDP2 shards gives the numbers of a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranks import Ranks
from sharding_cases import teacher_targets
from trainer_cases import NOT_INTERPRETED, Lab, save_model
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["full", "student_topk"])
def test_a_sharded_teacher_gives_the_numbers_of_a_whole_one(
    lab: Lab, tmp_path: Path, two: Ranks, targets: str, tied: bool
) -> None:
    model = save_model(tmp_path / "teacher", lab.student, hidden_size=24, tie_word_embeddings=tied)
    k = "" if targets == "full" else ", k: 2"
    teacher = f"teacher={{model: {model}, targets: {targets}{k}}}"
    config = lab.config(tmp_path, teacher)
    outside = 4 * 24 * (104 - 6 + 1) * (1 if tied else 2) - (0 if tied else 4 * 24)
    for (whole, _, size), (split, sharded, part) in zip(
        two(teacher_targets, config, False), two(teacher_targets, config, True), strict=True
    ):
        assert sum(".layers." in name for name in sharded) == 26  # of two layers
        for a, b in zip(whole, split, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        assert part - outside == (size - outside) // 2  # the layers' parts, and embedding, head and norm
