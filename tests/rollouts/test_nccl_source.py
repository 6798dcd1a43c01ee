"""What vLLM's NCCL sender reads of a model: its parameters, or those of a PEFT model with merged adapters."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from fused_distill.rollouts.nccl import NcclWeightSync
from torch import nn

peft = pytest.importorskip("peft")


class ParamMeta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives vLLM's source of a model's weights."""
    sources: list[Any] = []
    transfer: Any = ModuleType("vllm.distributed.weight_transfer")
    transfer.WeightSource, transfer.ModuleSource, transfer.ParamMeta = object, lambda m: m, ParamMeta
    transfer.WeightTransferTrainerFactory = type(
        "Factory", (), {"trainer_init": staticmethod(lambda *_, source, **__: sources.append(source))}
    )
    engine: Any = ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    engine.NCCLTrainerInitInfo = dict
    distributed: Any = ModuleType("vllm.distributed")
    distributed.weight_transfer = transfer
    for module in (ModuleType("vllm"), distributed, transfer, engine):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def of(model: nn.Module) -> Any:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"world_size": 1}))
        NcclWeightSync("http://vllm", model, address="10.0.0.1", port=29600, transport=transport)
        return sources[-1]

    return of


def test_adapters_are_merged_into_the_weights_that_are_sent(source: Any) -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    names = [name for name, _ in base.named_parameters()]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["1"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    sent = source(model)
    assert [meta.name for meta in sent.metadata()] == names
    weights = dict(sent)
    assert [(m.name, m.dtype, m.shape) for m in sent.metadata()] == [
        (name, w.dtype, tuple(w.shape)) for name, w in weights.items()
    ]
    x = torch.randn(5, 3)
    hidden = nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    torch.testing.assert_close(nn.functional.linear(hidden, weights["1.weight"]), model(x))


def test_a_model_without_adapters_is_sent_as_it_is(source: Any) -> None:
    model = nn.Linear(3, 2)
    assert source(model) is model
