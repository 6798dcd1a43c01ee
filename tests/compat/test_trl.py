"""TRL's distillation trainers train the same under `patch_trl`, without the logits of prompts."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill.compat import trl as compat
from fused_distill.compat.trl import patch_trl, unpatch_trl
from fused_distill.huggingface.lm_head import lm_head_of
from torch import Tensor
from trl_cases import (
    SERVED,
    FakeClient,
    assert_equal_runs,
    local,
    lora,
    server,
    train,
    training_inputs,
    trl,
)
from trl_cases import make_trainer as make_trainer_in

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LONG = {"layers": 6, "max_steps": 12}
BOTH = pytest.mark.parametrize("options", [{}, SERVED], ids=["local", "server"])
SERVER_CASES = [
    (0.0, 1, True),
    (0.0, 5, True),
    (0.0, 5, False),
    (0.3, 1, True),
    (0.3, 1, False),
    (1.0, 1, True),
]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


@pytest.fixture
def make_trainer(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    return partial(make_trainer_in, tiny_model, tmp_path)


def assert_trains_as_trl(make: Callable[[], Any], tolerance: float) -> None:
    peer = train(make())
    with patch_trl():
        ours = train(make())
    assert peer.losses[-1] != pytest.approx(peer.losses[0], rel=0.01)  # it did train
    assert_equal_runs(ours, peer, tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_training_with_a_local_teacher_equals_trls(make_trainer: Callable[..., Any], beta: float) -> None:
    assert_trains_as_trl(partial(make_trainer, beta, **LONG), 1e-5)


@pytest.mark.parametrize(("beta", "k", "tail"), SERVER_CASES)
def test_training_with_a_server_teacher_equals_trls(
    make_trainer: Callable[..., Any], beta: float, k: int, tail: bool
) -> None:
    assert_trains_as_trl(partial(make_trainer, beta, loss_top_k=k, loss_add_tail=tail, **LONG), 1e-10)


@BOTH
@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_of_adapters_equals_trls(
    make_trainer: Callable[..., Any], options: dict[str, int], accumulated: int
) -> None:
    make = partial(make_trainer, peft=lora(), gradient_accumulation_steps=accumulated, **options)
    assert_trains_as_trl(make, 1e-5)


@BOTH
def test_training_of_adapters_and_a_full_head_equals_trls(
    make_trainer: Callable[..., Any], options: dict[str, int]
) -> None:
    assert_trains_as_trl(
        lambda: make_trainer(peft=lora(modules_to_save=["lm_head"]), tied=False, **options), 1e-5
    )


def test_training_of_activated_lora_equals_trls(make_trainer: Callable[..., Any]) -> None:
    # aLoRA begins where PeftModel.forward finds the tokens; TRL's local trainer does not call that.
    assert_trains_as_trl(lambda: make_trainer(peft=lora(alora_invocation_tokens=[3]), **SERVED), 1e-10)


@BOTH
def test_evaluation_equals_trls(make_trainer: Callable[..., Any], options: Any) -> None:
    trainer = make_trainer(0.5, **options)
    inputs = training_inputs(trainer)
    trainer.model.eval()
    with torch.no_grad():
        peer = trainer.compute_loss(trainer.model, inputs)
        patch_trl()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), peer)


@BOTH
def test_trainer_computes_as_before_after_the_patch(
    make_trainer: Callable[..., Any], options: dict[str, int]
) -> None:
    trainer = make_trainer(0.5, **options)
    inputs = training_inputs(trainer)
    before = trainer.compute_loss(trainer.model, inputs)
    with patch_trl():
        trainer.compute_loss(trainer.model, inputs)
    assert torch.equal(trainer.compute_loss(trainer.model, inputs), before)


@BOTH
def test_models_compute_no_logits(make_trainer: Callable[..., Any], options: Any) -> None:
    trainer = make_trainer(0.5, **options)
    inputs = training_inputs(trainer)
    lm_head_of(trainer.model)  # which computes the logits of six tokens, once

    def refuse(_module: Any, _inputs: Any, output: Tensor) -> None:
        assert output.numel() == 1, "the output layer gave logits"

    trainer.model.lm_head.register_forward_hook(refuse)
    if trainer.teacher_model is not None:
        trainer.teacher_model.lm_head.register_forward_hook(refuse)
    patch_trl()
    trainer.compute_loss(trainer.model, inputs).backward()


def test_mixed_precision_covers_the_students_backbone(make_trainer: Callable[..., Any]) -> None:
    # accelerate's autocast wraps model.forward, which is not what runs.
    trainer = make_trainer(0.5, loss_top_k=1, bf16=True, max_steps=1)
    autocast = []

    def record(*_: Any) -> None:
        if torch.is_grad_enabled():
            autocast.append(torch.is_autocast_enabled("cpu"))

    trainer.model.base_model.norm.register_forward_hook(record)
    with patch_trl():
        trainer.train()
    assert autocast == [True, True]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_missing_log_probability_of_the_server_is_an_error(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    trainer = make_trainer(beta, loss_top_k=1)
    inputs = training_inputs(trainer)
    answer = FakeClient.get_sequence_logprobs

    def incomplete(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        result["actual_logprobs"][1][0] = [-torch.inf]
        return result

    monkeypatch.setattr(FakeClient, "get_sequence_logprobs", incomplete)
    patch_trl()
    with pytest.raises(ValueError, match=r"no log-probability .* at 1 of 4 completion tokens"):
        trainer.compute_loss(trainer.model, inputs)


def test_sharded_heads_are_gathered() -> None:
    # FSDP2's parameters are DTensors. One process suffices to test both directions.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        loss, entropy, n_tokens = compat._divergence_loss(hidden, hidden + 1, sharded, sharded, mask, 0.5)
        (gradient,) = torch.autograd.grad(loss, sharded)
        full = weight.requires_grad_()
        expected = local._chunked_divergence_loss(hidden, hidden + 1, full, full, mask, 0.5)
        torch.testing.assert_close((loss, entropy, n_tokens), expected)
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), torch.autograd.grad(expected[0], full)[0])
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor([7])])
def test_the_loss_is_divided_by_the_number_of_items_in_any_form(count: Any) -> None:
    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    heads, mask = (weight, weight + 1), torch.tensor([[1, 1, 0], [1, 0, 0]])
    actual = compat._divergence_loss(hidden, hidden + 1, *heads, mask, 0.5, count)
    expected = local._chunked_divergence_loss(hidden, hidden + 1, *heads, mask, 0.5, 7)
    torch.testing.assert_close(actual, expected)


def test_shards_that_cannot_be_gathered_are_refused() -> None:
    hidden, weight, mask = torch.randn(2, 3, 8), torch.randn(40, 8), torch.ones(2, 3)
    flat = weight.flatten()[:160]  # as under FSDP1 outside the forward of the unit that holds the weight
    freed = weight.clone()  # as under FSDP1 with use_orig_params=False
    freed.untyped_storage().resize_(0)
    for heads in ((flat, weight), (freed, weight), (weight, flat)):
        with pytest.raises(RuntimeError, match=r"output layer's weight is sharded .* use FSDP2"):
            compat._divergence_loss(hidden, hidden, *heads, mask, 0.5)


def state() -> tuple[Any, Any]:
    return local._chunked_divergence_loss, server.ServerDistillationTrainer.compute_loss


def test_second_patch_changes_nothing() -> None:
    before = state()
    patch_trl()
    patch_trl()
    assert state() == (compat._divergence_loss, compat._server_loss)
    unpatch_trl()
    assert state() == before
    unpatch_trl()
    assert state() == before


def test_context_manager_removes_the_patch_that_it_made() -> None:
    before = state()
    with patch_trl():
        with patch_trl():
            pass
        assert state() == (compat._divergence_loss, compat._server_loss)
    assert state() == before


def test_other_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(trl, "__version__", "1.160.0")
    with pytest.raises(ImportError, match=r"supports TRL 1\.16, found 1\.160\.0: pip install 'trl=="):
        patch_trl()
    assert state() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.delattr(server.ServerDistillationTrainer, "compute_loss"), "no such function"),
        (
            lambda m: m.setattr(local, "_chunked_divergence_loss", lambda hidden: hidden),
            r"found \['hidden'\]",
        ),
    ],
)
def test_changed_function_of_trl_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], match: str
) -> None:
    change(monkeypatch)
    before = vars(server.ServerDistillationTrainer).get("compute_loss"), local._chunked_divergence_loss
    with pytest.raises(RuntimeError, match=match):
        patch_trl()
    after = vars(server.ServerDistillationTrainer).get("compute_loss"), local._chunked_divergence_loss
    assert after == before


def test_missing_trl_is_an_error_that_names_the_package() -> None:
    code = """
import sys
sys.modules["trl"] = None
from fused_distill.compat.trl import patch_trl
try:
    patch_trl()
except ImportError as error:
    sys.exit("pip install 'trl==1.16.*'" not in str(error))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
