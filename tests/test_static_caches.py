"""Caches of a fixed size, written in place: rounds work on a copy, the caller's buffers hold what plain ones hold."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from callers import OPTIONS, Caller, both, greedy, prompt
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

from vericache_compile import stats


def padded(model: PreTrainedModel) -> Tensor:
    """Twice, with room for other lengths."""
    asked = {"do_sample": False, "cache_implementation": "static"}
    first = model.generate(**make_prompt(40, 3), max_new_tokens=30, **asked)
    return torch.cat([first, model.generate(**make_prompt(40, 3), max_new_tokens=40, **asked)], dim=1)


def one_cache_for_several_turns(model: PreTrainedModel) -> Tensor:
    """A second turn, a copied cache that goes its own way, and a reset one."""
    cache = StaticCache(config=model.config, max_cache_len=128)
    first = greedy(model, prompt(), count=12, past_key_values=cache)
    longer, twin = torch.cat([first, prompt(7)], dim=1), copy.deepcopy(cache)
    parts = [greedy(model, longer, count=12, past_key_values=cache)]
    parts.append(greedy(model, torch.cat([first, prompt(5)], dim=1), count=12, past_key_values=twin))
    cache.reset()
    return torch.cat([*parts, greedy(model, prompt(30), count=12, past_key_values=cache)], dim=1)


def sampling(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(3)
    return greedy(model, prompt(), do_sample=True, temperature=0.6, cache_implementation="static")


@torch.no_grad()
def by_hand(model: PreTrainedModel) -> Tensor:
    """A loop of one's own, where the model computes mask and positions from the count; padded on the left.

    With the second batch Dynamo makes its size symbolic; a cache that is first filled notes it.
    """
    tokens = []
    for batch in (1, 3):
        cache = StaticCache(config=model.config, max_cache_len=64)
        ids, mask = make_prompt(20, batch).values()
        for _ in range(30):
            ids = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(ids)
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
    return torch.cat(tokens)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(padded, marks=pytest.mark.slow),
        pytest.param(one_cache_for_several_turns, marks=pytest.mark.slow),
        sampling,
        by_hand,
    ],
)
def test_static_caches_give_plain_tokens_from_rounds(call: Caller) -> None:
    plain, ours, model = both(call, "llama", strict=True)
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 0
    assert stats(model)["graphs"]["not taken"] == 0


def test_the_callers_buffers_hold_what_plain_ones_hold() -> None:
    def fill(model: PreTrainedModel) -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=100)
        greedy(model, prompt(), count=20, past_key_values=cache)
        return cache

    model = make_tiny("llama")
    model.compile(backend="vericache", options=OPTIONS)
    plain, ours = fill(make_tiny("llama")), fill(model)
    assert int(ours.get_seq_length()) == int(plain.get_seq_length()) == 59
    for one, other in zip(ours.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
    assert stats(model)["rounds"] > 0


def test_a_buffer_that_someone_else_changed_is_read_again() -> None:
    """A step between rounds by the uncompiled model, with another token, is part of the history."""

    def decode(model: PreTrainedModel, between: Any) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=100)
        first = greedy(model, prompt(), count=6, past_key_values=cache)
        ids = torch.cat([first, prompt(1)], dim=1)
        second = between(model, ids, cache)
        return greedy(model, torch.cat([second, prompt(1)], dim=1), count=12, past_key_values=cache)

    def uncompiled(model: PreTrainedModel, ids: Tensor, cache: StaticCache) -> Tensor:
        held, model._compiled_call_impl = model._compiled_call_impl, None
        out = greedy(model, ids, count=4, past_key_values=cache)
        model._compiled_call_impl = held
        return out

    model = make_tiny("llama")
    plain = decode(make_tiny("llama"), uncompiled)
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(decode(model, uncompiled), plain)
    assert stats(model)["rounds"] > 1


def test_a_copy_is_released_with_the_buffers() -> None:
    model = make_tiny("llama")
    model.compile(backend="vericache", options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=100)
    greedy(model, prompt(), count=6, past_key_values=cache)
    assert stats(model)["bytes"]["all_sequences"] > 0
    del cache
    gc.collect()
    assert stats(model)["bytes"]["all_sequences"] == 0


def test_a_hybrid_of_sliding_static_layers_falls_back_with_its_reason() -> None:
    plain, ours, model = both(sampling, "gemma3_text")
    assert torch.equal(ours, plain)
    assert any("updated in place" in reason for reason in stats(model)["not_taken"])


def test_generates_own_compile_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """generate compiles the decode step by itself where it is told so, over a static cache."""
    monkeypatch.setenv("VERICACHE_INDUCTOR", "0")
    config = CompileConfig(backend="vericache")
    config._compile_all_devices = True  # else it leaves a CPU alone
    asked = {"count": 16, "cache_implementation": "static"}
    model = make_tiny("llama")
    ours = greedy(model, prompt(), compile_config=config, **asked)
    assert torch.equal(ours, greedy(make_tiny("llama"), prompt(), **asked))
    assert stats(model)["rounds"] > 0
