"""Tokens of small models are those of plain greedy decoding, whatever the compressor, window, batch and prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BATCHES, COMPRESSORS, NEW, PROMPTS, WINDOWS, Switch, make_prompt, make_tiny
from transformers import PreTrainedModel

from vericache_compile import stats

MODELS = ("llama", "qwen3", "gpt2")
QUICK = ("llama", "snapkv", 8)
"""The others of the grid are slow."""
GRID = [
    pytest.param(name, compressor, window, marks=() if (name, compressor, window) == QUICK else pytest.mark.slow)
    for name in MODELS
    for compressor in COMPRESSORS
    for window in WINDOWS
]


@pytest.fixture(scope="module")
def switched(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Switch]:
    """A small model, compiled under options that each test sets."""
    model, switch = make_tiny(request.param), Switch()
    model.compile(backend=switch)
    return model, switch


@pytest.mark.parametrize(("switched", "compressor", "window"), GRID, indirect=["switched"])
def test_tiny_models_give_plain_tokens(
    switched: tuple[PreTrainedModel, Switch], compressor: str, window: int, plain_tokens: Any
) -> None:
    """The grid on small models: batch 1 and a padded batch of 3, prompts of 1 to 3,000 tokens."""
    model, switch = switched
    name = model.config.model_type
    switch.options = {**COMPRESSORS[compressor], "window": window, "inductor": False}
    for batch in BATCHES:
        for tokens in PROMPTS:
            ours = model.generate(**make_prompt(tokens, batch), max_new_tokens=NEW, do_sample=False)
            assert torch.equal(ours, plain_tokens(name, tokens, batch, NEW)), f"batch {batch}, prompt {tokens}"
    assert stats(model)["rounds"] > 0
    assert stats(model)["not_taken"] == []


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_inductor_segments_give_plain_tokens(name: str, batch: int, plain_tokens: Any) -> None:
    """The same with compiled segments."""
    torch._dynamo.reset()
    model = make_tiny(name)
    model.compile(backend="vericache", options={"compressor": "streaming", "keep": 0.2, "window": 8})
    ours = model.generate(**make_prompt(700, batch), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours, plain_tokens(name, 700, batch, NEW))
    assert stats(model)["rounds"] > 0


def test_no_compression_accepts_every_draft(plain_tokens: Any) -> None:
    """A draft over the full cache is never wrong on a small model, so a round gives W tokens."""
    torch._dynamo.reset()
    model, exact = make_tiny("llama"), {"window": 8, "inductor": False, "draft_dtype": "same"}
    model.compile(backend="vericache", options={**COMPRESSORS["none"], **exact})
    model.generate(**make_prompt(31), max_new_tokens=1 + 5 * 8, do_sample=False)
    found = stats(model)
    assert (found["rounds"], found["accepted"], found["drafted"]) == (5, 35, 35)
