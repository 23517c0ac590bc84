"""Tokens are those of plain greedy decoding, whatever the compressor, window, batch and prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Switch, make_prompt, make_tiny
from transformers import PreTrainedModel

from vericache_compile import stats

NEW = 40
MODELS = ("llama", "qwen3", "gpt2")
COMPRESSORS: dict[str, dict[str, Any]] = {
    "none": {"compressor": "none"},
    "streaming": {"compressor": "streaming", "keep": 0.1},
    "snapkv": {"compressor": "snapkv", "keep": 0.1},
    "kivi": {"compressor": "kivi", "bits": 2},
}
WINDOWS = (2, 4, 8, 16, 32)
PROMPTS = (1, 2, 31, 700, 3000)
BATCHES = (1, 3)
LEFT = {"gpt2": {"a mask or position that depends on tokens"}}
"""Known refusals: gpt2 reads the shape of its tokens once Dynamo has made the batch symbolic."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not here: each small model is captured once for its whole grid."""


@pytest.fixture(scope="module", params=MODELS)
def switched(request: pytest.FixtureRequest) -> Iterator[tuple[str, PreTrainedModel, Switch]]:
    """A small model, compiled under options that each test sets."""
    torch._dynamo.reset()
    model, switch = make_tiny(request.param), Switch()
    model.compile(backend=switch)
    yield request.param, model, switch
    torch._dynamo.reset()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_tiny_models_give_plain_tokens(
    switched: tuple[str, PreTrainedModel, Switch], compressor: str, window: int, plain_tokens: Any
) -> None:
    """The whole grid on small models: batch 1 and a padded batch of 3, prompts of 1 to 3,000 tokens."""
    name, model, switch = switched
    switch.options = {**COMPRESSORS[compressor], "window": window, "inductor": False}
    for batch in BATCHES:
        for tokens in PROMPTS:
            ours = model.generate(**make_prompt(tokens, batch), max_new_tokens=NEW, do_sample=False)
            assert torch.equal(ours, plain_tokens(name, tokens, batch, NEW)), f"batch {batch}, prompt {tokens}"
    assert stats(model)["rounds"] > 0
    assert set(stats(model)["not_taken"]) <= LEFT.get(name, set())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
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


def _run_smollm2(model: PreTrainedModel, inputs: dict[str, torch.Tensor], count: int, **options: Any) -> None:
    torch._dynamo.reset()
    model._compiled_call_impl = None
    settings = {"max_new_tokens": count, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    model.compile(backend="vericache", options=options)
    ours = model.generate(**inputs, **settings)
    model._compiled_call_impl = None
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 0


def _document(ids: torch.Tensor, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    rows = torch.stack([ids[0, 500 * b : 500 * b + tokens] for b in range(batch)])
    mask = torch.ones_like(rows)
    for b in range(1, batch):
        rows[b, : tokens * b // 4], mask[b, : tokens * b // 4] = 2, 0
    return {"input_ids": rows, "attention_mask": mask}


@pytest.mark.parametrize(
    ("compressor", "window", "tokens", "batch"),
    [
        ("kivi", 8, 700, 1),
        ("streaming", 16, 31, 3),
        ("none", 32, 2, 1),
        ("snapkv", 16, 3000, 1),
    ],
)
def test_smollm2_gives_plain_tokens(
    smollm2: PreTrainedModel, document_ids: torch.Tensor, compressor: str, window: int, tokens: int, batch: int
) -> None:
    """A chosen part of the grid on real weights and real text, with compiled segments."""
    _run_smollm2(smollm2, _document(document_ids, tokens, batch), 48, **COMPRESSORS[compressor], window=window)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_smollm2_whole_grid(smollm2: PreTrainedModel, document_ids: torch.Tensor, compressor: str, window: int) -> None:
    """The whole grid on real weights and real text."""
    for batch in BATCHES:
        for tokens in PROMPTS:
            options = {**COMPRESSORS[compressor], "window": window, "inductor": False}
            _run_smollm2(smollm2, _document(document_ids, tokens, batch), NEW, **options)
