"""Adapters are merged as the model applies them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_distill.huggingface.adapters import merged_weights
from torch import Tensor, nn

peft = pytest.importorskip("peft")

IDS = torch.arange(5)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids)))


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["hidden"], "init_lora_weights": False, **options})


def assert_merged_is_applied(model: Any) -> None:
    """Load the merged weights into a model without adapters, and compare what both compute."""
    plain = Toy()
    plain.load_state_dict(dict(merged_weights(model, dict(model.named_parameters()))))
    torch.testing.assert_close(plain(IDS), model(IDS))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"bias": "all"}, {"target_modules": ["embed", "head"]}],
    ids=str,
)
def test_plain_lora_is_merged(options: dict[str, Any]) -> None:
    assert_merged_is_applied(peft.get_peft_model(Toy(), lora(**options)))


def two_adapters(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


def merged(model: Any) -> None:
    model.merge_adapter()


def one_of_two_merged(model: Any) -> None:
    two_adapters(model)
    model.merge_adapter(["other"])


@pytest.mark.parametrize("change", [two_adapters, merged, one_of_two_merged])
def test_what_the_model_adds_is_added_once(change: Callable[[Any], None]) -> None:
    model = peft.get_peft_model(Toy(), lora())
    model.add_adapter("other", lora(lora_alpha=3))
    change(model)
    assert_merged_is_applied(model)


def test_disabled_adapters_are_not_added() -> None:
    model = peft.get_peft_model(Toy(), lora())
    with model.disable_adapter():
        assert_merged_is_applied(model)
    assert_merged_is_applied(model)


def test_an_adapter_that_is_not_active_may_be_of_any_kind() -> None:
    model = peft.get_peft_model(Toy(), lora())
    model.add_adapter("other", lora(use_dora=True))
    assert_merged_is_applied(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), r"use_dora at hidden$"),
        (lora(lora_bias=True), r"lora_bias at hidden$"),
        (lora(modules_to_save=["head"]), r"modules_to_save at head$"),
        (lora(trainable_token_indices={"embed": [1]}), r"trainable_token_indices at embed$"),
        (lora(target_parameters=["head.weight"]), r".* \(target_parameters\), at head$"),
        (
            peft.IA3Config(target_modules=["hidden"], feedforward_modules=[]),
            r"the adapter 'default' of type IA3$",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else type(value).__name__,
)
def test_other_adapters_are_refused_by_name(config: Any, message: str) -> None:
    model = peft.get_peft_model(Toy(), config)
    with pytest.raises(ValueError, match=f"^model must have plain LoRA adapters .* got {message}"):
        merged_weights(model, dict(model.named_parameters()))


def test_convolutions_are_refused_by_their_type() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(2, 2, 3)), lora(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"a layer of type Conv2d at 0$"):
        merged_weights(model, dict(model.named_parameters()))


def test_merged_adapters_that_are_disabled_are_refused() -> None:
    """PEFT unmerges them in the next forward pass."""
    model = peft.get_peft_model(Toy(), lora())
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="merged and disabled at hidden"):
        merged_weights(model, dict(model.named_parameters()))
