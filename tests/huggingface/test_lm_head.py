"""Logits of `lm_head_of` equal the model's, for each family that scales or caps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill.huggingface.lm_head import lm_head_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": ("LlamaConfig", {}),
    "Gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "Gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    "Cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "Granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "HyperCLOVA X": ("HyperCLOVAXConfig", {"logits_scaling": 4.0, "head_dim": 8}),
    "GPT-2": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "Phi": ("PhiConfig", {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models_own(family: str) -> None:
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if family == "Phi":
        model.lm_head.bias.data.normal_()
    tokens = torch.randint(40, (2, 7))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=tokens).last_hidden_state
        logits = lm_head_of(model).logits(hidden)
        torch.testing.assert_close(logits, model(input_ids=tokens).logits)


def test_model_without_a_head_is_refused() -> None:
    model = transformers.AutoModel.from_config(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="model must have output embeddings, got LlamaModel"):
        lm_head_of(model)
