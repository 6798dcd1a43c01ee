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
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return vLLM's sources of models' weights."""
    sources: list[Any] = []

    class Engine:
        def __init__(self, *_: Any, source: Any, **__: Any):
            sources.append(source)

        def send_weights(self) -> None:
            raise AssertionError("weights were sent")

    transfer: Any = ModuleType("vllm.distributed.weight_transfer")
    transfer.WeightSource, transfer.ModuleSource, transfer.ParamMeta = object, lambda m: m, ParamMeta
    transfer.WeightTransferTrainerFactory = type("Factory", (), {"trainer_init": Engine})
    engine: Any = ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    engine.NCCLTrainerInitInfo = dict
    distributed: Any = ModuleType("vllm.distributed")
    distributed.weight_transfer = transfer
    for module in (ModuleType("vllm"), distributed, transfer, engine):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return sources


WORKERS = httpx.MockTransport(lambda _: httpx.Response(200, json={"world_size": 1}))


def sync(model: nn.Module, transport: httpx.MockTransport = WORKERS) -> NcclWeightSync:
    return NcclWeightSync("http://vllm", model, address="10.0.0.1", port=29600, transport=transport)


def test_adapters_are_merged_into_the_weights_that_are_sent(sources: list[Any]) -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    names = [name for name, _ in base.named_parameters()]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["1"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    sync(model)
    [sent] = sources
    assert [meta.name for meta in sent.metadata()] == names
    weights = dict(sent)
    assert [(m.name, m.dtype, m.shape) for m in sent.metadata()] == [
        (name, w.dtype, tuple(w.shape)) for name, w in weights.items()
    ]
    x = torch.randn(5, 3)
    hidden = nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    torch.testing.assert_close(nn.functional.linear(hidden, weights["1.weight"]), model(x))


def test_a_model_without_adapters_is_sent_as_it_is(sources: list[Any]) -> None:
    model = nn.Linear(3, 2)
    sync(model)
    assert sources == [model]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), {"target_modules": ["0"], "use_dora": True}, "use_dora at 0"),
        (Tied(), {"target_modules": ["lm_head"]}, r"share their weight, got one of lm_head"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_before_the_server_is_asked(
    sources: list[Any], model: nn.Module, options: dict[str, Any], message: str
) -> None:
    def asked(_: httpx.Request) -> httpx.Response:
        raise AssertionError("the server was asked")

    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match=f"^model must .*{message}"):
        sync(model, httpx.MockTransport(asked))
    assert sources == []


def test_adapters_that_were_added_later_are_refused_before_anything_is_sent(sources: list[Any]) -> None:
    plain = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), plain)
    nccl = sync(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="lora_bias at 0"):
        nccl.sync()
