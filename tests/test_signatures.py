"""Public signatures, compared with tests/signatures.json: a change of one changes its callers.

`PYTHONPATH=tests/helpers python tests/test_signatures.py` records them again, for a change that is meant.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused_distill
import pytest
import torch
from cases import INTERPRETED
from fused_distill import reference
from fused_distill.compat import liger, trl
from torch import nn

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

FILE = Path(__file__).with_name("signatures.json")
LOSS_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    fused_distill.FusedLinearJSDLoss: fused_distill.fused_linear_jsd,
    fused_distill.FusedLinearTopKJSDLoss: fused_distill.fused_linear_topk_jsd,
}


def public_callables() -> dict[str, Any]:
    callables = {name: getattr(fused_distill, name) for name in fused_distill.__all__ if name != "reference"}
    for module in LOSS_MODULES:
        callables[f"{module.__name__}.forward"] = callables.pop(module.__name__).forward
    return {
        **callables,
        "reference.linear_jsd": reference.linear_jsd,
        "reference.linear_topk_jsd": reference.linear_topk_jsd,
        "compat.liger.LigerFusedLinearJSD": liger.LigerFusedLinearJSD,
        "compat.liger.LigerFusedLinearJSD.forward": liger.LigerFusedLinearJSD.forward,
        "compat.liger.LigerFusedLinearJSDLoss": liger.LigerFusedLinearJSDLoss,
        "compat.liger.LigerFusedLinearJSDLoss.forward": liger.LigerFusedLinearJSDLoss.forward,
        "compat.trl.patch_trl": trl.patch_trl,
        "compat.trl.unpatch_trl": trl.unpatch_trl,
    }


def parameters(function: Any) -> list[str]:
    """Return names, kinds and defaults as they are written, without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return [part for part in str(inspect.Signature(bare))[1:-1].split(", ") if part]


def constructor_options(module: type[nn.Module]) -> dict[str, Any]:
    """Return the options of a loss module with their defaults: those of its function that forward lacks."""
    forward = inspect.signature(module.forward).parameters
    function = inspect.signature(LOSS_MODULES[module]).parameters
    return {name: p.default for name, p in function.items() if name not in forward}


def snapshot() -> dict[str, Any]:
    signatures: dict[str, Any] = {name: parameters(f) for name, f in public_callables().items()}
    return signatures | {module.__name__: constructor_options(module) for module in LOSS_MODULES}


RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize("name", sorted(RECORDED.keys() | snapshot().keys()))
def test_signature_equals_the_recorded_one(name: str) -> None:
    assert snapshot().get(name) == RECORDED.get(name)


@pytest.mark.parametrize("module", LOSS_MODULES)
def test_module_takes_the_recorded_options(module: type[nn.Module]) -> None:
    for name, default in RECORDED[module.__name__].items():
        module(**{name: default})
    module(**RECORDED[module.__name__])


@pytest.mark.parametrize("module", LOSS_MODULES)
def test_module_refuses_positional_and_unknown_options(module: Any) -> None:
    with pytest.raises(TypeError):
        module(0.5)
    for name in ("betta", "student_hidden", "mask", "student_bias", "labels", "normalizer"):
        with pytest.raises(TypeError, match=name):
            module(**{name: None})


@pytest.mark.parametrize("module", LOSS_MODULES)
def test_module_uses_the_functions_defaults(module: type[nn.Module]) -> None:
    teacher = torch.log_softmax(torch.randn(3, 7), -1) if "TopK" in module.__name__ else torch.randn(3, 5)
    last = torch.arange(7).expand(3, 7) if "TopK" in module.__name__ else torch.randn(7, 5)
    tensors = (torch.randn(3, 4), torch.randn(7, 4), teacher, last)
    assert torch.equal(module()(*tensors), LOSS_MODULES[module](*tensors))


@pytest.mark.parametrize("name", ["linear_jsd", "linear_topk_jsd"])
def test_reference_has_the_signature_of_the_fused_loss(name: str) -> None:
    fused = parameters(getattr(fused_distill, f"fused_{name}"))
    assert parameters(getattr(reference, name)) == [
        "backend='reference'" if parameter == "backend='auto'" else parameter for parameter in fused
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(snapshot(), indent=1) + "\n")
