"""For every causal-LM family of transformers, loss and gradients equal those from the model's own logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from fused_distill.huggingface.lm_head import last_hidden_states, lm_head_of
from tiny_families import (
    FAMILIES,
    NOT_BUILT,
    REFUSED,
    VOCABULARY,
    tiny_model,
    tiny_vision_model,
    transformers,
)
from torch import Tensor
from torch.nn import functional as F

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs no kernel"),
    pytest.mark.filterwarnings("ignore"),  # about configs
]

SUPPORTED = [family for family in FAMILIES if family not in NOT_BUILT and family not in REFUSED]
CHUNKS = [SUPPORTED[i : i + 12] for i in range(0, len(SUPPORTED), 12)]


def assert_loss_is_that_of_the_logits(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that transform their decoder's states
        head = lm_head_of(model)
    batch = {"input_ids": torch.randint(3, 37, (2, 6)), "use_cache": False}
    torch.manual_seed(1)  # for attention that hashes with random numbers
    logits = model(**batch).logits
    torch.manual_seed(1)
    hidden = last_hidden_states(model, **batch)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-5)

    teacher = torch.randn(logits.shape)
    expected = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="sum") / 12
    loss = fused_linear_jsd(
        hidden, head.weight, teacher, torch.eye(logits.shape[-1]), beta=0.0, **head.options("student_")
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    if isinstance(model, transformers.ReformerModelWithLMHead):
        return  # its backward pass raises an error in eval mode
    ours, peer = gradient(loss, model), gradient(expected, model)
    assert (ours - peer).norm() <= 1e-3 * peer.norm()


def gradient(loss: Tensor, model: Any) -> Tensor:
    """Return the gradients of all parameters in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("families", CHUNKS, ids=lambda families: f"{families[0]}-{families[-1]}")
def test_loss_of_each_family_is_that_of_its_logits(families: list[str]) -> None:
    failures = []
    for family in families:
        try:
            assert_loss_is_that_of_the_logits(tiny_model(family))
        except Exception as error:
            failures.append(f"{family}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def test_most_families_are_supported() -> None:
    assert len(SUPPORTED) >= 175


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_not_supported_is_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]):
        lm_head_of(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "text_family"),
    [("aya_vision", None), ("cohere2_vision", None), ("llava_next", "granite"), ("llava", "gemma2")],
)
def test_scale_and_softcap_that_a_multimodal_model_ignores_are_ignored(
    family: str, text_family: str | None
) -> None:
    assert_loss_is_that_of_the_logits(tiny_vision_model(family, text_family))


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "n_logits"),
    [
        ("cohere", 0.25, None, VOCABULARY),
        ("granite", 0.25, None, VOCABULARY),
        ("hyperclovax", 4.0, None, VOCABULARY),
        ("falcon_h1", 0.5, None, VOCABULARY),
        ("gemma2", 1.0, 5.0, VOCABULARY),
        ("gemma3", 1.0, None, VOCABULARY),  # with images, without the softcap of its text_config
        ("recurrent_gemma", 1.0, 5.0, VOCABULARY),
        ("xlstm", 1.0, 5.0, VOCABULARY),
        ("mpt", 1.0, None, VOCABULARY),
        ("minicpm3", 1.0, None, VOCABULARY),
        ("inkling2_text", 1.0, 5.0, VOCABULARY - 3),
    ],
)
def test_scale_and_softcap_are_exactly_those_that_the_model_applies(
    family: str, scale: float, softcap: float | None, n_logits: int
) -> None:
    head = lm_head_of(tiny_model(family))
    assert (head.logit_scale, head.softcap, len(head.weight)) == (scale, softcap, n_logits)
