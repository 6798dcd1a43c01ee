"""Fixtures of the tests of serving: a tiny model, a server of it, and counts of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, fields
from typing import Any

import pytest
import torch
from fault_cases import FaultCounts
from fused_distill.serving.server.transformers_engine import TransformersEngine
from serving_cases import LENGTH, VOCAB, serving


@pytest.fixture(scope="module")
def model() -> Any:
    """A Gemma 3 with softcapped logits and distributions that are not nearly uniform."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=LENGTH,
        final_logit_softcapping=10.0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def url(model: Any) -> Iterator[str]:
    """The address of a server of the model."""
    with serving(TransformersEngine(model)) as served:
        yield served.url


_COUNTS: list[FaultCounts] = []


@pytest.fixture
def row(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[FaultCounts]:
    """Counts of this test, kept for the table that is printed at the end."""
    counts = FaultCounts(request.node.name)
    yield counts
    _COUNTS.append(counts)
    for field in fields(FaultCounts):
        record_property(field.name, getattr(counts, field.name))


@pytest.fixture(scope="session", autouse=True)
def fault_table() -> Iterator[None]:
    """Print the counts of all tests as a Markdown table; pytest -s shows it."""
    yield
    names = [field.name for field in fields(FaultCounts)]
    if not _COUNTS:
        return
    for line in (names, ["---"] * len(names), *(astuple(counts) for counts in _COUNTS)):
        print("|", " | ".join(map(str, line)), "|")
