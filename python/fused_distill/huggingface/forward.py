"""Running a model in eval mode, or with a function in place of a module's forward."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@contextmanager
def evaluated(model: nn.Module) -> Generator[None, None, None]:
    """Put a model into eval mode, and restore each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents first
            if module.training != training:
                module.train(training)


@contextmanager
def replaced_forward(module: nn.Module, replacement: Callable[..., Any]) -> Generator[None, None, None]:
    """Make `replacement` the forward of `module`. Hooks of the module, e.g. FSDP's, run as before."""
    own = module.__dict__.get("forward")  # e.g. that of accelerate
    module.forward = replacement
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_inside_forward(
    wrapper: Callable[..., Any], module: nn.Module, function: Callable[..., T], *inputs: Tensor
) -> T:
    """Call `function` in place of the forward of `module`, by calling `wrapper`, e.g. its FSDP wrapper."""
    forward, results = module.forward, list[T]()

    def replacement(*inputs: Tensor) -> T:
        with replaced_forward(module, forward):  # so that `function` may call the module
            results.append(function(*inputs))
        return results[0]

    with replaced_forward(module, replacement):
        wrapper(*inputs)
    return results[0]  # the wrapper's own return value may be cast by FSDP


class _InOneGraph(torch.autograd.Function):
    """Return a tensor whose graph also leads to others, which get no gradient; their hooks run."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.n_others = len(others)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], *[None] * ctx.n_others


def states_at_head(model: Callable[..., Any], head: nn.Module, **inputs: Any) -> Tensor:
    """Return the (B, L, D) input of `head`, a model's LM head, on its device, without its product.

    A wrapper finds all it looks for in the graph: DDP the parameters of the head, which the loss uses
    beside the states, and FSDP2 the model's output, before whose backward pass it gathers the weights.

    Args:
        model: called with `inputs`; the model or what wraps it.
        head: the output layer of the model.
        inputs: of the model.
    """
    kept = list[Tensor]()

    def replacement(states: Tensor) -> Tensor:
        device = next(head.parameters(), states).device
        if device.type != "meta":  # of offloaded weights
            states = states.to(device)  # as the replaced forward does in a model on several devices
        kept.append(states)
        placeholder: Any = _InOneGraph.apply(states.new_zeros(1, 1, 1), states, *head.parameters())
        return placeholder.clone()  # FSDP2 warns of views

    with replaced_forward(head, replacement):
        output = model(**inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return _InOneGraph.apply(kept[0], logits)  # pyright: ignore[reportReturnType]


def run_at_head(
    model: Callable[..., Any], head: nn.Module, function: Callable[[Tensor], T], **inputs: Any
) -> T:
    """Call `function` with the input of `head`, a model's LM head, in place of its product.

    Args:
        model: called with `inputs`; the model or what wraps it.
        head: the output layer of the model.
        function: takes the (B, L, D) hidden states and returns a tensor, or a tuple that begins with one.
        inputs: of the model, e.g. input_ids and attention_mask.
    """
    results = list[T]()

    def replacement(states: Tensor) -> Tensor:
        results.append(function(states))
        first: Any = results[0][0] if isinstance(results[0], tuple) else results[0]
        # Models scale, cap and slice the (B, L, V) logits that they expect here. FSDP needs the graph.
        return first.reshape(-1)[:1].reshape(1, 1, 1)

    with replaced_forward(head, replacement):
        model(**inputs)
    return results[0]
