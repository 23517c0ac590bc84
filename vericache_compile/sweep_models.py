"""Small random models of many families, for `vericache sweep`: two layers, no weights to fetch.

A wide initialisation and a head of its own keep logits far from ties, and texts from repeating one token. Where a
family has sliding windows, they are shorter than the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vericache_compile.errors import VericacheError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 97
POSITIONS = 512
LAYERS = 2
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
COMMON: dict[str, Any] = BASE | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT: dict[str, Any] = BASE | {
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
}
SLIDING: dict[str, Any] = {"sliding_window": 16}
MIXED: dict[str, Any] = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS: dict[str, Any] = {"head_dim": 16}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
HYBRIDS = ("lfm2", "qwen3_next", "falcon_h1", "bamba", "jamba")
"""Families with recurrent layers: not taken."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | SLIDING,
    "qwen2": COMMON,
    "qwen3": COMMON | HEADS,
    "gemma": COMMON | HEADS,
    "gemma2": COMMON | HEADS | MIXED,
    "gemma3_text": COMMON | HEADS | MIXED,
    "phi": COMMON,
    "phi3": COMMON,
    "gpt2": GPT,
    "gpt_neox": COMMON,
    "gpt_neo": BASE
    | {
        "hidden_size": 64,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "window_size": 16,
        "max_position_embeddings": POSITIONS,
    },
    "gptj": GPT | {"rotary_dim": 8},
    "opt": COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "bloom": BASE | {"hidden_size": 64, "n_layer": LAYERS, "n_head": 4},
    "falcon": COMMON | {"multi_query": True},
    "falcon-alibi": COMMON | {"multi_query": False, "alibi": True},
    "mpt": BASE
    | {
        "d_model": 64,
        "n_layers": LAYERS,
        "n_heads": 4,
        "max_seq_len": POSITIONS,
        "use_cache": True,
    },
    "olmo2": COMMON,
    "starcoder2": COMMON | SLIDING,
    "cohere": COMMON,
    "cohere2": COMMON | HEADS | MIXED,
    "granite": COMMON,
    "smollm3": COMMON,
    "glm": COMMON | HEADS,
    "stablelm": COMMON,
    "mixtral": COMMON | EXPERTS,
    "qwen3_moe": COMMON | HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "granitemoe": COMMON | EXPERTS,
    "gpt_oss": COMMON | HEADS | MIXED | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v2": COMMON | LATENT | {"topk_method": "greedy"},
    "deepseek_v3": COMMON | LATENT,
    "glm4_moe_lite": COMMON | LATENT,
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": COMMON | HEADS | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": COMMON | HEADS | MAMBA | {"mamba_d_ssm": 64},
    "bamba": COMMON | MAMBA | {"attn_layer_indices": [1], "mamba_expand": 1},
    "jamba": COMMON | {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_dt_rank": 4},
}
"""Configurations by name: transformers' model type, and after a hyphen what is particular."""


def check_names(names: Sequence[str]) -> list[str]:
    """The given names, or all; VericacheError for one that is not in the table."""
    for name in names:
        if name not in MODELS:
            known = ", ".join(MODELS)
            raise VericacheError(f"no small model named {name!r}", "the names to sweep", f"take some of: {known}")
    return list(names or MODELS)


def attentions_of(name: str) -> tuple[str, ...]:
    """The attention implementations that a family has: sdpa and eager, or eager alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.for_model(name.partition("-")[0], **MODELS[name])
    return ("sdpa", "eager") if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else ("eager",)


def make_model(name: str, attention: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in float32 that never ends its text; `changes` go to its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.partition("-")[0], **MODELS[name] | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
