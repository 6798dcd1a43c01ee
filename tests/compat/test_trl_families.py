"""`patch_trl` leaves loss and gradients of TRL's server trainer as they are, for every causal-LM family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill.compat.trl import patch_trl, unpatch_trl
from tiny_families import FAMILIES, NOT_BUILT, REFUSED
from tiny_families import tiny_model as family_model
from torch import Tensor
from trl_cases import make_trainer, training_inputs

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend"),
    pytest.mark.filterwarnings("ignore"),  # about configs
]

# Trains in train mode only, on sequences of one length.
UNTRAINABLE = {"reformer"}
SUPPORTED = [family for family in FAMILIES if family not in {*NOT_BUILT, *REFUSED, *UNTRAINABLE}]
CHUNKS = [SUPPORTED[i : i + 20] for i in range(0, len(SUPPORTED), 20)]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


@pytest.fixture
def trainer(tiny_model: Path, tmp_path: Path) -> Any:
    # The temperature keeps tails from vanishing, of which TRL loses the digits.
    return make_trainer(tiny_model, tmp_path, 0.3, loss_top_k=1, temperature=20.0)


def loss_and_gradient(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradients of all parameters in one vector."""
    model.zero_grad()
    torch.manual_seed(0)  # for attention that hashes with random numbers
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equals_trl(trainer: Any, model: Any, inputs: dict[str, Any]) -> None:
    peer_loss, peer = loss_and_gradient(trainer, model, inputs)
    with patch_trl():
        loss, ours = loss_and_gradient(trainer, model, inputs)
    torch.testing.assert_close(loss, peer_loss, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert torch.equal(ours.isnan(), peer.isnan())  # of attention from padding alone
    assert (ours - peer).nan_to_num().norm() <= 1e-3 * peer.nan_to_num().norm()


@pytest.mark.parametrize("families", CHUNKS, ids=lambda families: f"{families[0]}-{families[-1]}")
def test_loss_of_each_family_equals_trls(trainer: Any, families: list[str]) -> None:
    inputs, failures = training_inputs(trainer), []
    for family in families:
        try:
            assert_equals_trl(trainer, family_model(family), inputs)
        except Exception as error:
            failures.append(f"{family}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_not_supported_is_refused_by_name(trainer: Any, family: str) -> None:
    inputs = training_inputs(trainer)
    patch_trl()
    with pytest.raises(ValueError, match=REFUSED[family]):
        trainer.compute_loss(family_model(family), inputs)
