"""Checks that vLLM has the weights that it was sent: of checkpoints before, of log-probabilities after."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..huggingface.fingerprint import local_checkpoint, tensor_shapes
from ..serving.client.identity import mean_difference
from ..serving.client.retry import ServerError

Shapes = dict[str, tuple[int, ...]]

_PROBE_TOKENS = 16
# A bfloat16 server is up to 0.1 nats off a float32 trainer (Gemma 3 270M, mean over 32 random tokens).
_LARGEST_DIFFERENCE = 0.3
_ROUNDING = 1e-3


class WeightsError(ServerError):
    """vLLM generates with other weights than it was sent."""


class TokenLogprobs(NamedTuple):
    """A model's log-probabilities of some tokens, by which its weights are recognized."""

    tokens: list[int]
    logprobs: list[float]  # of every token but the first


def probe_tokens(vocab_size: int) -> list[int]:
    """Return 16 fixed tokens of a vocabulary. Random ones have the most sensitive log-probabilities."""
    return random.Random(0).choices(range(vocab_size), k=_PROBE_TOKENS)


@torch.no_grad()
def model_logprobs(model: Any, vocab_size: int, device: torch.device) -> TokenLogprobs:
    """Return a model's log-probabilities of `probe_tokens`, at temperature 1.

    Args:
        model: a causal language model. All processes of a sharded model call this together.
        vocab_size: of the model's config.
        device: of the model's inputs.
    """
    tokens = probe_tokens(vocab_size)
    ids = torch.tensor([tokens], device=device)
    logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    return TokenLogprobs(tokens, logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist())


class WeightsCheck:
    """Comparison of vLLM's log-probabilities with those of the weights that it was sent."""

    def __init__(self) -> None:
        self.sent: TokenLogprobs | None = None  # vLLM's own, right after it received the weights
        self.tolerance = _LARGEST_DIFFERENCE

    def received(self, expected: TokenLogprobs | None, got: TokenLogprobs) -> None:
        """Take vLLM's log-probabilities right after it received weights.

        The first difference shows how much rounding alone makes; from then on three times as much is allowed.

        Raises:
            WeightsError: they are not those of the model that computed `expected`.
        """
        if expected is not None:
            self._compare("the model that was sent", expected, got)
            difference = mean_difference(expected.logprobs, got.logprobs)
            self.tolerance = min(self.tolerance, 3 * difference + _ROUNDING)
        self.sent = got

    def unchanged(self, got: TokenLogprobs) -> None:
        """Raise a WeightsError if vLLM's log-probabilities are not those after it received weights."""
        if self.sent is not None:
            self._compare("the weights that it received last", self.sent, got)

    def _compare(self, what: str, expected: TokenLogprobs, got: TokenLogprobs) -> None:
        difference = mean_difference(expected.logprobs, got.logprobs)
        if not difference <= self.tolerance:
            raise WeightsError(
                f"vLLM does not have {what}: its log-probabilities of {len(got.logprobs)} tokens differ by "
                f"{difference:.3g} nats on average, where rounding explains at most {self.tolerance:.2g}"
            )


class Checkpoint(NamedTuple):
    """A checkpoint in the format of transformers, checked before vLLM loads it.

    One that does not fit ends vLLM's engine, or is accepted although a layer is missing.
    """

    path: Path  # absolute
    shapes: Shapes
    config: dict[str, Any]  # of the language model

    @classmethod
    def read(cls, folder: Path | str) -> Checkpoint:
        """Read names and shapes, not the weights.

        Raises:
            FileNotFoundError: the folder does not exist, or lacks config.json or safetensors files.
            ValueError: a file is damaged, or a tensor of the index or a layer of the config is missing.
        """
        path = Path(folder).resolve()
        if not path.is_dir():
            raise FileNotFoundError(f"folder must hold a checkpoint, got {path}, which does not exist")
        for pattern in ("config.json", "*.safetensors"):
            if not any(path.glob(pattern)):
                raise FileNotFoundError(f"folder must hold a checkpoint, got {path}, which has no {pattern}")
        shapes = tensor_shapes(path)
        index = path / "model.safetensors.index.json"
        indexed: set[str] = set(json.loads(index.read_text())["weight_map"]) if index.exists() else set()
        if missing := sorted(indexed - shapes.keys()):
            raise ValueError(f"folder must hold its index's tensors, got {path}, which lacks {missing[:3]}")
        config = _language_config(path)
        # The first number in a tensor's name is that of its layer.
        numbers = {int(number) for name in shapes for number in re.findall(r"\.(\d+)\.", name)[:1]}
        lost = [i for i in range(config.get("num_hidden_layers", 0)) if numbers and i not in numbers]
        if lost:
            raise ValueError(f"folder must hold its config's layers, got {path}, which lacks layer {lost[0]}")
        return cls(path, shapes, config)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size in the config.

        Raises:
            ValueError: it is neither there nor known to transformers.
        """
        if "vocab_size" not in self.config:
            raise ValueError(
                f"folder must hold a config.json with vocab_size, got {self.path}, whose config lacks it and "
                "is of no model_type that an installed transformers knows"
            )
        return self.config["vocab_size"]

    def check_shapes(self, like: Shapes) -> None:
        """Compare names and shapes with those of the model that vLLM has.

        Tensors may be renamed, and a tied LM head may be left out.

        Raises:
            ValueError: they differ.
        """
        tied = self.config.get("tie_word_embeddings", False)
        got, want = (
            {name: shape for name, shape in s.items() if not (tied and name.endswith("lm_head.weight"))}
            for s in (self.shapes, like)
        )
        needed = f"folder must hold a checkpoint of the model that vLLM has, got {self.path},"
        for name in sorted(got.keys() & want.keys()):
            if got[name] != want[name]:
                raise ValueError(f"{needed} whose {name} has shape {got[name]}, not {want[name]}")
        missing, unknown = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
        if Counter(want[name] for name in missing) != Counter(got[name] for name in unknown):
            raise ValueError(f"{needed} which lacks {missing[:3]} and has unknown {unknown[:3]}")


def _language_config(path: Path) -> dict[str, Any]:
    """Return the config of a checkpoint's language model; what it lacks is transformers' default."""
    config = json.loads((path / "config.json").read_text())
    config |= config.get("text_config", {})
    missing = {"vocab_size", "num_hidden_layers"} - config.keys()
    if missing:
        try:
            from transformers import AutoConfig

            known: Any = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        except Exception:  # transformers is not installed, or each unknown config fails in its own way
            return config
        fields = known.to_dict()  # no properties: LongCat's num_hidden_layers counts its layers twice
        own_names = {name: known.attribute_map.get(name, name) for name in missing}
        config |= {name: fields[own] for name, own in own_names.items() if own in fields}
    return config


def loaded_shapes(name: str, revision: str | None = None) -> Shapes | None:
    """Return the shapes of the model that vLLM loaded by its name, or None if its files are not here."""
    folder = local_checkpoint(name, revision)
    return (None if folder is None else tensor_shapes(folder)) or None
