"""Run a transformers model on a few tokens to find what it computes before and after its LM head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .forward import evaluated, replaced_forward
from .head_weight import head_weight

# Given to the model as logits: one for the scale, one for the softcap, and others that must agree with both.
_TINY, _HUGE = 2.0**-10, 2.0**40
_PROBES = (_TINY, -1.5, 20.0, -60.0, _HUGE, 0.0)


class HeadCheck(NamedTuple):
    """How a model's logits follow from its hidden states."""

    n_logits: int  # rows of the LM head that give logits
    logit_scale: float
    softcap: float | None
    decoder_matches: bool  # True if the LM head's input is the last hidden state of `decoder`


def check_head(
    model: Any, layer: nn.Module, decoder: Callable[..., Any] | None, run: Callable[..., Any]
) -> HeadCheck:
    """Run the model twice on six tokens, and return how its logits follow from its hidden states.

    The LM head's product is compared with the layer's own. Then known numbers take the place of its logits,
    and what the model returns tells the scale and the softcap, exactly and whatever the weights.

    Args:
        model: a causal language model. Its mode and the state of random numbers stay as they are.
        layer: its output layer.
        decoder: what is called for the model's last hidden states, None if there is no such module.
        run: the model or what wraps it.

    Raises:
        ValueError: the logits do not follow from one linear layer, a scale and a softcap.
    """
    name = type(model).__name__
    inputs: dict[str, Any] = {"input_ids": ordinary_tokens(model)}
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs["use_cache"] = False
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # states, logits, expected logits, probes
    forward = layer.forward

    def probe(states: Tensor) -> Tensor:
        weight, bias = head_weight(layer, name)
        logits = forward(states)
        index = torch.arange(logits.shape[-2], device=logits.device).unsqueeze(1)
        index = index + torch.arange(logits.shape[-1], device=logits.device)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        probes = torch.tensor(_PROBES, dtype=dtype, device=logits.device)[index % len(_PROBES)]
        calls.append((states, logits, F.linear(states.to(weight), weight, bias), probes))
        return probes.expand(*logits.shape)

    with _undisturbed(model, inputs["input_ids"].device):
        try:
            with replaced_forward(layer, probe):
                returned = run(**inputs).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each family that needs other inputs fails in its own way
            raise _refusal(
                name, f"its forward cannot be run on token ids alone ({type(error).__name__}: {error})"
            ) from error
        if len(calls) != 1:
            raise _refusal(name, f"its forward calls the output layer {len(calls)} times")
        (states, logits, expected, probes), *_ = calls
        matches = decoder is not None and _decoder_gives(states, decoder, inputs)
    if states.ndim != 3:
        raise _refusal(name, f"its output layer gets an input of {states.ndim} dimensions, not (B, L, D)")
    if not _close(expected, logits):
        raise _refusal(name, f"its output layer, a {type(layer).__name__}, is no product with its weight")
    scale, softcap = _transform(name, probes, returned.to(probes.device), config_numbers(model))
    return HeadCheck(returned.shape[-1], scale, softcap, matches)


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"the logits of {name} cannot be computed from its output layer: {reason}. If you know how they "
        "follow from hidden states, give the losses a weight, bias, logit scale and softcap of your own"
    )


def _transform(
    name: str,
    probes: Tensor,  # (L, V)
    returned: Tensor,  # (1, L, V) or fewer columns
    config_numbers: list[float],
) -> tuple[float, float | None]:
    """Return the scale and the softcap that turn the probes into what the model returned."""
    if returned.shape[:-1] != (1, len(probes)) or not 0 < returned.shape[-1] <= probes.shape[1]:
        shapes = f"{tuple(returned.shape)} where the layer gave {tuple(probes.shape)}"
        raise _refusal(name, f"it returns logits of shape {shapes}")
    probes, found = probes[:, : returned.shape[-1]].double(), returned[0].double()
    tolerance = max(1e-5, 4 * torch.finfo(returned.dtype).eps)

    def measured(probe: float) -> float:
        return float(found[probes == probe].median())

    scale = _exact(measured(_TINY) / _TINY, config_numbers, tolerance)
    softcap = None
    if abs(measured(_HUGE)) < 0.5 * abs(scale) * _HUGE:
        softcap = _exact(measured(_HUGE), config_numbers, tolerance)
    expected = scale * probes
    if softcap is not None and softcap > 0:
        expected = softcap * torch.tanh(expected / softcap)
    expected = expected.to(returned.dtype).double()
    wrong = ~torch.isclose(found, expected, rtol=tolerance, atol=0)
    if scale == 0 or wrong.any():
        row, token = wrong.nonzero()[0].tolist() if wrong.any() else (0, 0)
        raise _refusal(
            name,
            f"after it the model does more than to scale and cap, e.g. token {token} gets the logit "
            f"{float(found[row, token]):g} where the layer gave {float(probes[row, token]):g}",
        )
    return scale, softcap


def _exact(measured: float, config_numbers: list[float], tolerance: float) -> float:
    """Return the config's number, or its inverse, that equals a measured one within rounding, if any."""
    numbers = [1.0, *config_numbers, *(1 / n for n in config_numbers if n)]
    close = [n for n in numbers if abs(n - measured) <= tolerance * abs(measured)]
    return min(close, key=lambda n: abs(n - measured)) if close else measured


def config_numbers(model: Any) -> list[float]:
    """Return the numbers in the model's config."""
    configs = (model.config, model.config.get_text_config())
    return [float(v) for config in configs for v in vars(config).values() if type(v) in (int, float)]


def ordinary_tokens(model: Any) -> Tensor:
    """Return six ordinary token ids (1, 6), none of which the config names, e.g. for images or padding."""
    config = model.config.get_text_config()
    named = {
        value
        for fields in (vars(model.config), vars(config))
        for key, value in fields.items()
        if isinstance(value, int) and key.endswith(("_id", "_index"))
    }
    ids = [i for i in range(min(config.vocab_size, 200)) if i not in named] or [0]
    row = [ids[i % len(ids)] for i in range(len(_PROBES))]
    return torch.tensor([row], device=model.get_input_embeddings().weight.device)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Evaluate without gradients, and restore each module's mode and the state of random numbers."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    random_state = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
    with torch.no_grad(), random_state, evaluated(model):
        _seed(device)
        yield


def _seed(device: torch.device) -> None:
    """Seed the CPU and one device. torch.manual_seed would seed all devices, which nobody restores."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _decoder_gives(states: Tensor, decoder: Callable[..., Any], inputs: dict[str, Any]) -> bool:
    """Return True if the decoder's last hidden states are the given ones."""
    _seed(inputs["input_ids"].device)  # as for the model, where attention hashes with random numbers
    try:
        last = decoder(**inputs).last_hidden_state
    except Exception:  # a decoder that needs more than token ids
        return False
    return last.shape == states.shape and _close(last, states)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if a and b differ by little more than one rounding of their largest entry."""
    tolerance = max(1e-4, 4 * torch.finfo(b.dtype).eps)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
