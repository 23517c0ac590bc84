"""Models with sliding layers: plain tokens from rounds, ghosts of plain shapes, bits that no draft changes."""

from __future__ import annotations

import copy

import pytest
import torch
from callers import OPTIONS, Caller, both, greedy, prompt, step_by_step
from models import OLDER, SLIDING, SLIDING_WINDOW, VOCABULARY, Switch, make_prompt, make_tiny
from test_canonical import logits_of, random_guess, use_drafter
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.model_state import state_of
from vericache_compile.sweep_models import make_model


@pytest.mark.parametrize(
    ("name", "tokens", "batch"),
    [
        pytest.param("mistral", 5, 1, marks=pytest.mark.slow),
        ("gemma3_text", 40, 3),
        pytest.param("starcoder2", 40, 1, marks=pytest.mark.slow),
        pytest.param("cohere2", 12, 3, marks=pytest.mark.slow),
    ],
)
def test_sliding_layers_give_plain_tokens(name: str, tokens: int, batch: int) -> None:
    """Short prompts cross the end of the window while decoding, each side in graphs of its own."""
    inputs, model = make_prompt(tokens, batch), make_tiny(name)
    plain = make_tiny(name).generate(**inputs, max_new_tokens=40, do_sample=False)
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(model.generate(**inputs, max_new_tokens=40, do_sample=False), plain)
    assert stats(model)["rounds"] > 0
    assert stats(model)["graphs"]["not taken"] == 0


def several_ways(model: PreTrainedModel) -> Tensor:
    """Beam search, a cropped cache, and copies of one cache that part: each finds its ghosts another way."""
    cache = DynamicCache(config=model.config)
    short = greedy(model, prompt(5), count=5, past_key_values=cache)
    cache.crop(-4)
    kept = torch.cat([short[:, : cache.get_seq_length()], prompt(1)], dim=1)
    parts = [greedy(model, kept, count=20, past_key_values=cache), greedy(model, prompt(), count=20, num_beams=3)]
    cache = DynamicCache(config=model.config)
    step_by_step(model, cache, prompt(), 3)
    for i in range(2):
        parts += step_by_step(model, copy.deepcopy(cache), prompt(5).roll(i, 1), 15)
    return torch.cat([*parts, *step_by_step(model, cache, prompt(1), 15)], dim=1)


def a_cache_without_a_configuration(model: PreTrainedModel) -> Tensor:
    """All columns are kept; the mask alone slides, and is left out until the window is full."""
    return torch.cat(step_by_step(model, DynamicCache(), prompt(9), 30), dim=1)


def a_cache_from_the_uncompiled_model(model: PreTrainedModel) -> Tensor:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    cache = DynamicCache(config=model.config)
    first = step_by_step(model, cache, prompt(), 3)
    model._compiled_call_impl = compiled
    return torch.cat(first + step_by_step(model, cache, first[-1], 20), dim=1)


def prompt_lookup(model: PreTrainedModel) -> Tensor:
    """Records the past of sliding layers, so that it can crop them."""
    return greedy(model, prompt(), prompt_lookup_num_tokens=3, count=20)


ALIKE = pytest.mark.skipif(
    OLDER, reason="older transformers crop sliding layers to another length than full ones, which raises"
)
CALLERS = [
    pytest.param(several_ways, marks=pytest.mark.slow),
    pytest.param(a_cache_without_a_configuration, marks=pytest.mark.slow),
    a_cache_from_the_uncompiled_model,
    pytest.param(prompt_lookup, marks=[ALIKE, pytest.mark.slow]),
]


@pytest.mark.parametrize("call", CALLERS)
def test_callers_with_sliding_layers_get_plain_tokens(call: Caller) -> None:
    plain, ours, model = both(call, "gemma3_text" if call is not a_cache_without_a_configuration else "mistral")
    assert torch.equal(ours, plain)
    assert stats(model)["graphs"]["not taken"] == 0
    assert stats(model)["rounds"] > 0 or call is prompt_lookup


@pytest.mark.slow
def test_a_first_call_on_a_full_sliding_cache_falls_back_once() -> None:
    """Where all layers slide, nothing in that call's graph says how long the cache is."""
    plain, ours, model = both(a_cache_from_the_uncompiled_model, "mistral")
    assert torch.equal(ours, plain)
    assert stats(model)["graphs"]["not taken"] == 1
    assert stats(model)["rounds"] > 0


@pytest.mark.parametrize("tokens", [pytest.param(5, marks=pytest.mark.slow), 40])
def test_ghosts_have_the_shapes_of_the_plain_cache(tokens: int) -> None:
    def shapes(model: PreTrainedModel) -> list[tuple[int, ...]]:
        cache = DynamicCache(config=model.config)
        found = []
        for ids in (prompt(tokens), prompt(1), prompt(1)):
            step_by_step(model, cache, ids, 1)
            found += [tuple(layer.keys.shape) for layer in cache.layers] + [(cache.get_seq_length(),)]
        return found

    model = make_tiny("gemma3_text")
    model.compile(backend="vericache", options=OPTIONS)
    assert shapes(model) == shapes(make_tiny("gemma3_text"))


def test_rows_of_sliding_layers_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, switch = make_tiny("gemma3_text"), make_prompt(250, 2), Switch()
    model.compile(backend=switch)
    settings = {"window": 8, "inductor": False}
    first = logits_of(model, switch, inputs, 30, compressor="none", **settings)
    lossy = {"compressor": "streaming", "keep": 0.1, **settings}
    assert torch.equal(first, logits_of(model, switch, inputs, 30, **lossy))
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, switch, inputs, 30, **lossy)), "random guesses"


@pytest.mark.parametrize(
    ("name", "changes"),
    [("gpt_oss", {}), pytest.param("gemma2", {"attn_logit_softcapping": 2.0}, marks=pytest.mark.slow)],
)
def test_rows_are_bit_equal_wherever_full_kv_lives(name: str, changes: dict[str, float]) -> None:
    """Sliding layers beside full ones, with sinks or soft caps: only what a window touches comes in."""
    model, inputs, switch = make_model(name, "eager", **changes), make_prompt(300, 3), Switch()
    model.compile(backend=switch)
    settings = {"window": 8, "inductor": False}
    first = logits_of(model, switch, inputs, 20, compressor="none", placement="device", **settings)
    for options in ({"compressor": "streaming", "keep": 0.1}, {"compressor": "kvsharer(share=0.5)"}):
        made = logits_of(model, switch, inputs, 20, placement="host", staging_mb=0.001, **options, **settings)
        assert torch.equal(first, made), options
        found = stats(model)
        assert (found["placement"], found["graphs"]["not taken"]) == ("host", 0)
        per_column = len(inputs["input_ids"]) * found["bytes"]["per_token_full"]
        assert 0 < found["bytes"]["transferred"] / found["rounds"] / per_column < 200, options


def test_a_draft_attends_to_the_whole_window_of_a_sliding_layer() -> None:
    """With every layer sliding nothing is lost to compression: each draft stands."""
    model = make_tiny("mistral")
    model.compile(backend="vericache", options={**OPTIONS, "keep": 0.05, "draft_dtype": "same"})
    model.generate(**make_prompt(40), max_new_tokens=1 + 1 + 4 * 8, do_sample=False)
    found = stats(model)
    assert found["drafted"] == found["accepted"] > 0
    assert SLIDING_WINDOW < 40 and SLIDING["mistral"]["num_hidden_layers"] == found["sites"]


def test_a_budget_for_all_layers_is_shared_by_those_that_are_compressed() -> None:
    """KVzip ranks keys over layers; those of sliding layers take no part in that."""
    model = make_tiny("gemma3_text")
    model.compile(backend="vericache", options={**OPTIONS, "compressor": "kvzip", "keep": 0.2})
    model.generate(**make_prompt(150), max_new_tokens=4, do_sample=False)
    state = state_of(list(model.parameters()))
    assert state is not None and state.latest is not None and state.latest.session.newest is not None
    draft = state.latest.session.newest.draft
    assert draft is not None and stats(model)["seconds"]["repeat"] > 0
    [region] = draft.layers[1].regions
    kept = sum(region.head_slots or (region.slots,) * 2) / 2 / region.covered
    assert 0.15 < kept < 0.25, "keep is 0.2"
