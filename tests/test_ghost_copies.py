"""Caches that are copied, reordered, repeated, dropped or damaged: plain tokens, or an error that names the way out."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.errors import GhostError

OPTIONS: dict[str, Any] = {"inductor": False, "compressor": "snapkv", "keep": 0.2, "window": 4}
Caller = Callable[[PreTrainedModel], Tensor]


def prompt(tokens: int = 50, batch: int = 1, seed: int = 0) -> Tensor:
    return make_prompt(tokens, seed=seed)["input_ids"].expand(batch, -1).contiguous()


def greedy(model: PreTrainedModel, ids: Tensor, count: int = 12, **more: Any) -> Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, **more}
    return model.generate(ids, **settings)


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """A cache that holds a prompt, and the next token of each row."""
    cache = DynamicCache(config=model.config)
    return cache, model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)


@torch.no_grad()
def go_on(model: PreTrainedModel, cache: DynamicCache, token: Tensor, count: int = 10) -> Tensor:
    """The next `count` greedy tokens [B, count] by a hand-written loop."""
    tokens = []
    for _ in range(count):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def compiled(name: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    model = make_tiny(name, seed=seed)
    model.compile(backend="vericache", options={**OPTIONS, **options})
    return model


def change(cache: DynamicCache, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of a cache."""
    for layer in cache.layers:
        layer.keys, layer.values = function(layer.keys), function(layer.values)


def one_prefix_for_several_prompts(model: PreTrainedModel) -> Tensor:
    prefix = prompt()
    cache, token = read_prompt(model, prefix)
    answers = []
    for seed in range(1, 4):
        ids = torch.cat([prefix, prompt(5 + seed, seed=seed)], dim=1)
        answers.append(greedy(model, ids, past_key_values=copy.deepcopy(cache))[:, -12:])
    return torch.cat([*answers, go_on(model, cache, token)], dim=1)


def copies_made_half_way(model: PreTrainedModel) -> Tensor:
    """Each copy goes its own way, and so does the original."""
    cache, token = read_prompt(model, prompt())
    first = go_on(model, cache, token, 6)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    own = go_on(model, cache, first[:, -1:])
    others = [go_on(model, copied, torch.full((1, 1), 7 + i)) for i, copied in enumerate(copies)]
    return torch.cat([first, own, *others, go_on(model, copies[0], others[0][:, -1:])], dim=1)


def a_copy_that_outlives_its_original(model: PreTrainedModel) -> Tensor:
    cache, token = read_prompt(model, prompt())
    copied = copy.deepcopy(cache)
    del cache
    return go_on(model, copied, token)


def a_copy_of_a_copy(model: PreTrainedModel) -> Tensor:
    cache, token = read_prompt(model, prompt())
    copied = copy.deepcopy(copy.deepcopy(cache))
    first = go_on(model, copied, token)
    return torch.cat([first, go_on(model, copy.deepcopy(copied), first[:, -1:])], dim=1)


def a_shallow_copy(model: PreTrainedModel) -> Tensor:
    """Both caches hold the very same tensors until one of them goes on."""
    cache, token = read_prompt(model, prompt())
    other = DynamicCache(config=model.config)
    for layer, (held, source) in enumerate(zip(other.layers, cache.layers, strict=True)):
        held.lazy_initialization(source.keys, source.values)
        other.layers[layer].keys, other.layers[layer].values = source.keys, source.values
    first = go_on(model, cache, token)
    second = go_on(model, other, torch.full((1, 1), 9))
    return torch.cat([first, second, go_on(model, cache, first[:, -1:])], dim=1)


def beam_search(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), num_beams=3, count=20)


def beam_search_over_a_padded_batch(model: PreTrainedModel) -> Tensor:
    return model.generate(**make_prompt(50, 3), num_beams=2, num_return_sequences=2, max_new_tokens=15, do_sample=False)


def several_samples(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(1)
    return greedy(model, prompt(), do_sample=True, num_return_sequences=3, count=20)


def rows_reordered(model: PreTrainedModel) -> Tensor:
    cache, token = read_prompt(model, torch.cat([prompt(seed=seed) for seed in range(3)]))
    order = torch.tensor([2, 0, 0])
    first = go_on(model, cache, token)
    cache.reorder_cache(order)
    return torch.cat([first, go_on(model, cache, first[order, -1:])], dim=1)


def rows_repeated(model: PreTrainedModel) -> Tensor:
    """One prompt is read once and answered twice."""
    cache, token = read_prompt(model, torch.cat([prompt(), prompt(seed=1)]))
    cache.batch_repeat_interleave(2)
    token = token.repeat_interleave(2, dim=0)
    token[1::2] = 5
    return go_on(model, cache, token)


def rows_selected(model: PreTrainedModel) -> Tensor:
    """A row is dropped half way, by indexing and by slicing."""
    cache, token = read_prompt(model, torch.cat([prompt(seed=seed) for seed in range(3)]))
    first = go_on(model, cache, token)
    cache.batch_select_indices(torch.tensor([0, 2]))
    second = go_on(model, cache, first[[0, 2], -1:])
    change(cache, lambda x: x[:1])
    return torch.cat([first[:1], second[:1], go_on(model, cache, second[:1, -1:])], dim=1)


def rows_expanded(model: PreTrainedModel) -> Tensor:
    cache, token = read_prompt(model, prompt())
    change(cache, lambda x: x.expand(3, -1, -1, -1))
    return go_on(model, cache, torch.cat([token, token + 1, token + 2]) % 90)


def cropped_to_nothing(model: PreTrainedModel) -> Tensor:
    """The next prompt's prefill sees a cache of no columns; it is not taken, and the data it leaves is adopted."""
    cache, token = read_prompt(model, prompt())
    first = go_on(model, cache, token)
    cache.crop(-cache.get_seq_length())
    return torch.cat([first, greedy(model, prompt(30, seed=4), past_key_values=cache)], dim=1)


def caches_from_the_uncompiled_model(model: PreTrainedModel) -> Tensor:
    """Real data in a cache, more than once: no queries of its tokens were ever seen."""
    answers = []
    for seed in range(3):
        held, model._compiled_call_impl = model._compiled_call_impl, None
        cache, token = read_prompt(model, prompt(seed=seed))
        model._compiled_call_impl = held
        answers.append(go_on(model, cache, token))
    return torch.cat(answers, dim=1)


CALLERS: list[Any] = [
    one_prefix_for_several_prompts, copies_made_half_way, a_copy_that_outlives_its_original, a_copy_of_a_copy,
    a_shallow_copy, pytest.param(beam_search, marks=pytest.mark.slow), beam_search_over_a_padded_batch, several_samples,
    rows_reordered, rows_repeated,
    rows_selected, rows_expanded, cropped_to_nothing, caches_from_the_uncompiled_model,
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One compiled model for all tests that do not change its options."""
    return compiled()


@pytest.mark.parametrize("call", CALLERS, ids=lambda call: call.__name__)
def test_copies_give_plain_tokens_from_rounds(call: Caller, model: PreTrainedModel) -> None:
    read_prompt(model, prompt())
    before = stats(model)["rounds"]
    assert torch.equal(call(model), call(make_tiny("llama")))
    assert stats(model)["rounds"] > before


@pytest.mark.parametrize(
    "call",
    [beam_search, pytest.param(one_prefix_for_several_prompts, marks=pytest.mark.slow)],
    ids=lambda call: call.__name__,
)
def test_copies_give_plain_tokens_with_learned_positions(call: Caller) -> None:
    assert torch.equal(call(compiled("gpt2")), call(make_tiny("gpt2")))


def test_a_padded_batch_is_taken_where_dynamo_has_made_its_size_symbolic() -> None:
    """Its mask then reads the batch from the embedded tokens: their size, not what they hold."""
    model = compiled()
    read_prompt(model, prompt())
    assert torch.equal(beam_search_over_a_padded_batch(model), beam_search_over_a_padded_batch(make_tiny("llama")))
    assert stats(model)["rounds"] > 0
    assert stats(model)["not_taken"] == []


def test_beam_search_leaves_no_sequences_behind(model: PreTrainedModel) -> None:
    gc.collect()  # compiling leaves cycles that hold a first call's cache, under any backend
    greedy(model, prompt(), num_beams=3, count=20)
    greedy(model, prompt(), count=4)
    found = stats(model)["bytes"]
    assert found["all_sequences"] <= 3 * (found["full"] + found["draft"])


# Caches that cannot be used


def refuses(model: PreTrainedModel, cache: DynamicCache, found: str) -> str:
    """Go on with a cache that is refused; the error's way out."""
    with pytest.raises(GhostError, match=found) as error:
        go_on(model, cache, torch.ones(cache.layers[0].keys.shape[0], 1, dtype=torch.int64), 1)
    assert error.value.where
    assert "run the prompt again" in error.value.fix
    return error.value.fix


@pytest.mark.parametrize("layers", [slice(0, 1), slice(1, 2), slice(None)], ids=["first layer", "last layer", "all"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_cache_changed_by_arithmetic_is_refused(factor: float, layers: slice, model: PreTrainedModel) -> None:
    cache, token = read_prompt(model, prompt())
    go_on(model, cache, token)
    for layer in cache.layers[layers]:
        layer.keys = layer.keys * factor
        assert layer.keys.isnan().all()
    assert "arithmetic" in refuses(model, cache, "NaN where cached keys or values should be")


def test_a_cache_of_nan_is_refused(model: PreTrainedModel) -> None:
    cache, _ = read_prompt(model, prompt())
    change(cache, lambda x: torch.full_like(x, float("nan")))
    refuses(model, cache, "NaN where cached keys or values should be")


def test_a_copy_whose_original_was_cropped_is_refused(model: PreTrainedModel) -> None:
    cache, token = read_prompt(model, prompt())
    first = go_on(model, cache, token)
    copied = copy.deepcopy(cache)
    cache.crop(-5)
    go_on(model, cache, first[:, -6:-5])
    assert "uncropped" in refuses(model, copied, "cropped")


def test_a_copy_whose_original_is_gone_is_refused(model: PreTrainedModel) -> None:
    cache, _ = read_prompt(model, prompt())
    copied = copy.deepcopy(cache)
    del cache
    gc.collect()  # a first compilation leaves frames behind that hold what it saw
    read_prompt(model, prompt(seed=1))
    assert "keep the cache that it was copied from alive" in refuses(model, copied, "no longer held")


def test_tensors_from_before_a_crop_are_refused(model: PreTrainedModel) -> None:
    """The caller kept the cache's tensors, cropped, and went on as far: the old ones are not taken for the new."""
    cache, token = read_prompt(model, prompt())
    first = go_on(model, cache, token)
    aside = [(layer.keys, layer.values) for layer in cache.layers]
    cache.crop(-8)
    go_on(model, cache, (first[:, -9:-8] + 1) % 90, 8)
    for layer, (keys, values) in zip(cache.layers, aside, strict=True):
        layer.keys, layer.values = keys, values
    refuses(model, cache, "cropped below it")


def test_rows_of_two_prompts_are_not_joined(model: PreTrainedModel) -> None:
    cache, _ = read_prompt(model, prompt())
    other, _ = read_prompt(model, prompt(seed=1))
    for layer, source in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat([layer.keys, source.keys])
        layer.values = torch.cat([layer.values, source.values])
    refuses(model, cache, "rows come from different sequences")


# Several models and configurations


def test_two_models_of_one_make_never_mix() -> None:
    """Dynamo runs one compiled graph for both; each has its own sequences."""
    plain = [make_tiny("llama", seed=seed) for seed in (0, 1)]
    ours = [compiled(seed=seed) for seed in (0, 1)]
    runs = []
    for models in (plain, ours):
        held = [read_prompt(model, prompt()) for model in models]
        tokens = [token for _, token in held]
        out = []
        for _ in range(15):
            for i, model in enumerate(models):
                tokens[i] = go_on(model, held[i][0], tokens[i], 1)
                out.append(tokens[i])
        runs.append(torch.cat(out))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][::2], runs[0][1::2])
    for model in ours:
        assert stats(model)["rounds"] > 0
        assert stats(model)["served_rows"] == 15


def test_a_cache_of_another_model_is_refused(model: PreTrainedModel) -> None:
    other = compiled(seed=1)
    cache, _ = read_prompt(model, prompt())
    read_prompt(other, prompt())
    refuses(other, cache, "no longer held")


CHANGES: list[Any] = [
    {"compressor": "kivi", "bits": 2, "keep": None},
    {"window": 8},
    pytest.param({"keep": 0.05, "window": 2}, marks=pytest.mark.slow),
    pytest.param({"compressor": "none", "keep": None, "window": 16}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_options_may_change_half_way(options: dict[str, Any]) -> None:
    """The same sequence goes on under another configuration, and back under the first."""
    plain = make_tiny("llama")
    cache, token = read_prompt(plain, prompt(90))
    expected = go_on(plain, cache, token, 30)
    model = compiled()
    cache, token = read_prompt(model, prompt(90))
    found = [token]
    for more in ({}, options, {}):
        model.compile(backend="vericache", options={**OPTIONS, **more})
        found.append(go_on(model, cache, found[-1][:, -1:]))
        assert stats(model)["rounds"] > 0
        assert stats(model)["window"] == {**OPTIONS, **more}["window"]
    assert torch.equal(torch.cat(found[1:], dim=1), expected)
