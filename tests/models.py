"""Small models, prompts and plain references that the tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from vericache_compile.testing import VOCABULARY, Switch, make_prompt

__all__ = ["BATCHES", "COMPRESSORS", "OLDER", "PROMPTS", "VOCABULARY", "WINDOWS", "Switch", "make_prompt", "make_tiny"]
OLDER = Version(transformers.__version__) < Version("5.23")
"""Whether transformers is one that spells some things in another way."""
POSITIONS = 4096
NEW = 40
"""New tokens per run of the exactness grid: compressors x windows x batches x prompt lengths."""
COMPRESSORS: dict[str, dict[str, Any]] = {
    "none": {"compressor": "none"},
    "streaming": {"compressor": "streaming", "keep": 0.1},
    "snapkv": {"compressor": "snapkv", "keep": 0.1},
    "kivi": {"compressor": "kivi", "bits": 2},
}
SLIDING_WINDOW = 16
"""Columns that a token of a sliding layer attends to, its own included."""
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"num_hidden_layers": 2},
    "starcoder2": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 3, "layer_types": LAYERS},
    "cohere2": {"num_hidden_layers": 3, "layer_types": LAYERS},
}
"""Models with sliding layers: all of them, or some beside full ones."""
WINDOWS = (2, 4, 8, 16, 32)
BATCHES = (1, 3)
"""Rows; those after the first are padded on the left."""
PROMPTS = (1, 2, 31, 700, 3000)


def _config(name: str, positions: int, layers: int) -> Any:
    if name == "llama":
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            initializer_range=0.2,
        )
    if name == "qwen3":
        return Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=positions,
            initializer_range=0.2,
        )
    if name in SLIDING:
        return CONFIG_MAPPING[name](
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=positions,
            initializer_range=0.2,
            sliding_window=SLIDING_WINDOW,
            **SLIDING[name],
        )
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_positions=positions,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_tiny(name: str, positions: int = POSITIONS, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A random model (those with sliding layers have their own number of them); logits are far from ties."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(name, positions, layers)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@cache
def plain_tokens_of(name: str, tokens: int, batch: int, count: int, layers: int = 2) -> torch.Tensor:
    """Plain greedy tokens of a tiny model."""
    return make_tiny(name, layers=layers).generate(**make_prompt(tokens, batch), max_new_tokens=count, do_sample=False)
