"""A tiny random model of each causal-LM family that transformers has, so that all of them can be tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

VOCABULARY = 128  # more than the tokens of the tests' tokenizer
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Where the class of a config has these fields, they are set. Scales and softcaps differ from the defaults,
# so that a family whose config has one and which ignores it is told from a family that applies it.
_SIZES: dict[str, Any] = {
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    "unpadded_vocab_size": VOCABULARY - 3,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "pronunciation_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("shape_vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "image_size", "qk_head_dim", "dim"), 16),
    **dict.fromkeys(("hidden_size_global", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "patch_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "shared_intermediate_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("moe_k", "mamba_n_heads", "index_topk"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "bos_token_id", "mamba_n_groups"), 1),
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "num_kv_shared_layers": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid"] * 2
# Further changes of single families; None leaves the default of a field.
_CHANGES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "mimo_v2_flash": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "minicpm3": {"logits_scaling": None, "dim_model_base": 8},
    "mpt": {"logit_scale": "inv_sqrt_d_model"},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 8], "axial_pos_shape": [8, 8]},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "qk_head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": _HYBRID, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _HYBRID, "num_hidden_layers": 4},
}


# Families without a tiny model, and why.
NOT_BUILT = {
    "blt": "its patcher and its encoder hash bytes, which takes a config of its own",
    "dots3_note": "its config holds settings of single layers beyond the second",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts tokens for another model, from that model's keys and values",
    "gemma4_unified_assistant": "drafts tokens for another model, from that model's keys and values",
    "mimo_v2_flash": "its config holds head counts of single layers that a tiny model has not",
    "musicgen": "transformers cannot build it from its config",
    "musicgen_melody": "transformers cannot build it from its config",
}
# Families that are built and refused, and the reason that the error gives.
REFUSED = {"prophetnet": "ProphetNetForCausalLM .* gets an input of 4 dimensions"}


def tiny_model(family: str) -> Any:
    """Return a random model of a causal-LM family, in eval mode, with logits between about 1 and 100."""
    config_class = CONFIG_MAPPING[family]
    return _model(transformers.AutoModelForCausalLM, config_class(**_sizes(config_class(), family)))


def tiny_vision_model(family: str, text_family: str | None = None) -> Any:
    """Return a random model of a family with images, whose language model is of its own or another family."""
    config_class = CONFIG_MAPPING[family]
    sizes = _sizes(config_class(), family)
    if text_family is not None:
        text = _sizes(CONFIG_MAPPING[text_family](), text_family)
        sizes["text_config"] = {**text, "model_type": text_family}
    return _model(transformers.AutoModelForImageTextToText, config_class(**sizes))


def _model(auto_class: Any, config: Any) -> Any:
    config.get_text_config().use_cache = False  # caches need layers that a tiny model may lack
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    model.get_output_embeddings().weight.data.mul_(50)
    return model


def _sizes(default: Any, family: str) -> dict[str, Any]:
    """Return the arguments that make a config tiny, for its parts, e.g. a text_config, too."""
    changes = _CHANGES.get(family, {})
    parts = {
        name: {**_sizes(value, value.model_type), "model_type": value.model_type}
        for name, value in vars(default).items()
        if isinstance(value, transformers.PreTrainedConfig)
    }
    names = [] if "text_config" in parts else [name for name in _SIZES if _has(default, name)]
    merged = {**{name: _SIZES[name] for name in names}, **parts, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except NotImplementedError:  # of a field that a family refuses
        return False
    except Exception:  # of a field that may differ between layers
        return True
