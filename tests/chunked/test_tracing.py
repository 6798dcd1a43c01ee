"""Every public function under torch.compile, torch.export, a default device, and with extreme sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import (
    FusedLinearJSDLoss,
    FusedLinearTopKJSDLoss,
    fused_linear_jsd,
    fused_linear_topk_jsd,
    reference,
    topk_logprobs,
)
from fused_distill.chunked import gemm as gemm_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about what every backend shares")

Arguments = tuple[Tensor, ...]


def full(n: int = 6, vocab: int = 9, width: int = 4) -> Arguments:
    return torch.randn(n, width), torch.randn(vocab, width), torch.randn(n, 5), torch.randn(vocab, 5)


def topk(n: int = 6, vocab: int = 9, width: int = 4) -> Arguments:
    logprobs, ids = torch.log_softmax(torch.randn(n, vocab), -1).topk(min(3, vocab))
    return torch.randn(n, width), torch.randn(vocab, width), logprobs, ids


def logprobs_of(hidden: Tensor, weight: Tensor, _: Tensor, ids: Tensor) -> Tensor:
    result = topk_logprobs(hidden, weight, 1, ids)
    assert result.actual_logprobs is not None
    return torch.cat([result.logprobs, result.actual_logprobs], -1)


FUSED: list[tuple[Callable[..., Any], Callable[..., Arguments]]] = [
    (fused_linear_jsd, full),
    (FusedLinearJSDLoss(), full),
    (fused_linear_topk_jsd, topk),
    (FusedLinearTopKJSDLoss(tail="renormalize"), topk),
    (logprobs_of, topk),
]
REFERENCES: list[tuple[Callable[..., Any], Callable[..., Arguments]]] = [
    (reference.linear_jsd, full),
    (reference.linear_topk_jsd, topk),
]


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


@pytest.mark.parametrize(("function", "arguments"), FUSED + REFERENCES)
def test_compiled_caller_breaks_the_graph(function: Any, arguments: Any) -> None:
    torch._dynamo.reset()
    tensors = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torch.compile(lambda *t: function(*t) * 2, backend="eager")(*tensors)
    torch.testing.assert_close(actual, function(*tensors) * 2)


def test_compiled_topk_logprobs_do_not_trace_onednns_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_module, "use_onednn", lambda device, dtype: dtype == torch.float32)
    torch._dynamo.reset()
    hidden, weight, *_ = full()
    expected = topk_logprobs(hidden, weight, 3).logprobs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torch.compile(lambda h: topk_logprobs(h, weight, 3).logprobs)(hidden)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("function", "arguments"), FUSED)
def test_exported_function_gives_the_same_result(function: Any, arguments: Any) -> None:
    tensors = arguments()
    exported = torch.export.export(Model(function), tensors, strict=False).module()
    torch.testing.assert_close(exported(*tensors), function(*tensors))


@pytest.mark.parametrize(("function", "arguments"), FUSED)
def test_recorded_operations_give_the_same_result(function: Any, arguments: Any) -> None:
    tensors = arguments()
    record = make_fx(lambda *t: function(*t))(*tensors)
    others = tuple(2 * t if t.is_floating_point() and t.max() > 0 else t for t in tensors)
    torch.testing.assert_close(record(*others), function(*others))


@pytest.mark.parametrize(("function", "arguments"), FUSED)
def test_simulated_tensors_give_a_simulated_result(function: Any, arguments: Any) -> None:
    with FakeTensorMode() as mode:
        result = function(*(mode.from_tensor(t) for t in arguments()))
    for tensor in result if isinstance(result, tuple) else (result,):
        assert isinstance(tensor, FakeTensor)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_other_backends_are_refused_for_a_record(backend: Any) -> None:
    with pytest.raises(ValueError, match=f"^backend='{backend}' cannot be recorded or simulated by PyTorch"):
        make_fx(lambda *t: fused_linear_jsd(*t, backend=backend))(*full())


def test_logits_of_many_megabytes_can_be_exported() -> None:
    """Buffers of this size are advised to be in huge pages, by their address, which export does not have."""
    tensors = tuple(torch.randn(*shape) for shape in ((256, 4), (9000, 4), (256, 4), (9000, 4)))
    exported = torch.export.export(Model(fused_linear_jsd), tensors, strict=False).module()
    torch.testing.assert_close(exported(*tensors), fused_linear_jsd(*tensors))


@pytest.mark.parametrize(("function", "arguments"), REFERENCES)
def test_export_of_the_reference_is_refused_by_name(function: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match=r'^backend must not be "reference" under torch.export'):
        torch.export.export(Model(function), arguments(), strict=False)


def test_export_with_a_mask_is_refused_by_name() -> None:
    model = Model(lambda *t: fused_linear_jsd(*t[:4], mask=t[4]))
    with pytest.raises(ValueError, match=r"^mask must be None under torch.export"):
        torch.export.export(model, (*full(), torch.ones(6, dtype=torch.bool)), strict=False)


def test_a_mask_is_refused_by_name_where_its_tokens_cannot_be_counted() -> None:
    mask = torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^mask must be None under torch\.export, make_fx and"):
        make_fx(lambda *t: fused_linear_jsd(*t[:4], mask=t[4]))(*full(), mask)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"^mask must be None"):
        fused_linear_jsd(*(mode.from_tensor(t) for t in full()), mask=mode.from_tensor(mask))


@pytest.mark.parametrize(("function", "arguments"), FUSED + REFERENCES)
def test_tensors_without_data_are_refused_by_name(function: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match="hidden must be on a device with data, got meta"):
        function(*(t.to("meta") for t in arguments()))


@pytest.mark.parametrize(("function", "arguments"), FUSED + REFERENCES)
def test_default_device_of_the_caller_does_not_matter(function: Any, arguments: Any) -> None:
    tensors = arguments()
    with torch.device("meta"):
        actual = function(*tensors)
    assert torch.equal(actual, function(*tensors))


@pytest.mark.parametrize(("function", "arguments"), FUSED)
def test_hidden_states_without_features_are_refused_by_name(function: Any, arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"hidden must have shape \(..., D\) with D >= 1"):
        function(*arguments(width=0))


@pytest.mark.parametrize(("function", "arguments"), FUSED + REFERENCES)
@pytest.mark.parametrize("sizes", [{"vocab": 1}, {"n": 0}], ids=["one token", "no position"])
def test_smallest_sizes_give_zero(function: Any, arguments: Any, sizes: dict[str, int]) -> None:
    assert (function(*arguments(**sizes)) == 0).all()
