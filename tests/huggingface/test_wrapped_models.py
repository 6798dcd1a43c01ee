"""`lm_head_of` and `last_hidden_states` of models inside DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from fused_distill.huggingface.lm_head import last_hidden_states, lm_head_of
from tiny_families import tiny_model
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs no kernel"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOKENS = torch.randint(3, 37, (2, 7))


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def ddp(**options: Any) -> Callable[[Any], Any]:
    return lambda model: DistributedDataParallel(model, **options)


def fsdp(**options: Any) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model, **options)

    return wrap


WRAPPERS = {
    "ddp": ddp(),
    "ddp, unused parameters": ddp(find_unused_parameters=True),
    "ddp, static graph": ddp(static_graph=True),
    "fsdp2": fsdp(),
    "fsdp2, resharded root": fsdp(reshard_after_forward=True),
}


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters.*")
@pytest.mark.parametrize("family", ["llama", "gemma"])  # gemma ties its LM head
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_gradients_are_those_of_the_model_alone(wrap: Callable[[Any], Any], family: str) -> None:
    teacher = torch.randn(2, 7, 16), torch.randn(128, 16)

    def backward(model: Any) -> None:
        head = lm_head_of(model)
        fused_linear_jsd(last_hidden_states(model, input_ids=TOKENS), head.weight, *teacher).backward()

    alone, inner = tiny_model(family), tiny_model(family)
    inner.load_state_dict(alone.state_dict())
    lm_head_of(inner)
    wrapped = wrap(inner)
    for model in (alone, wrapped):
        for _ in range(2):
            backward(model)
    actual, expected = (dict(model.named_parameters()) for model in (inner, alone))
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        gradient: Any = parameter.grad
        whole: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(whole, expected[name].grad)


def test_the_head_of_a_ddp_model_is_that_of_the_model() -> None:
    model = tiny_model("cohere")
    assert lm_head_of(DistributedDataParallel(model)) == lm_head_of(model)
