"""Models that cache a latent (multi-head latent attention): plain tokens, canonical bits, and caches that are copied,
cropped, reordered or built outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Switch
from test_canonical import compiled, logits_of, random_guess, use_drafter, wrong_guess
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.sweep_models import VOCABULARY, make_model

EAGER = {"window": 8, "inductor": False, "draft_dtype": "same"}
SIZES = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
"""All different, so that nothing taken for something else fits."""
DENSE = {"first_k_dense_replace": 2}
"""No layer with experts."""
SPELLINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek_v3", "sdpa", {}),
    ("deepseek_v3", "eager", {"q_lora_rank": None}),
    ("deepseek_v3", "sdpa", {"rope_interleave": False, "first_k_dense_replace": 2}),
]
COMPRESSORS = ["snapkv(keep=0.3, window=8)", "kivi(bits=2, group=8)", "streaming(keep=0.1)"]


def make_latent(name: str = "deepseek_v3", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    torch._dynamo.reset()
    return make_model(name, attention, **SIZES | changes)


def make_prompt(tokens: int, batch: int = 1) -> dict[str, Tensor]:
    """Rows after the first are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        mask[b, : 7 * b] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("name", "attention", "changes"), SPELLINGS)
def test_tokens_are_those_of_plain_generate(name: str, attention: str, changes: dict[str, Any]) -> None:
    model, switch = make_latent(name, attention, **changes), Switch()
    plain = {batch: model.generate(**make_prompt(60, batch), max_new_tokens=25, do_sample=False) for batch in (1, 3)}
    model.compile(backend=switch)
    for batch, expected in plain.items():
        for compressor in ["none", *COMPRESSORS]:
            switch.options = {"compressor": compressor, **EAGER}
            made = model.generate(**make_prompt(60, batch), max_new_tokens=25, do_sample=False)
            assert torch.equal(made, expected), (batch, compressor)
            found = stats(model)
            assert (found["not_taken"], found["graphs"]["not taken"]) == ([], 0)
            assert found["rounds"] > 0
            if compressor == "none":
                assert found["tokens_per_round"] == 8


def test_rows_are_bit_equal_whatever_drafts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_latent(), make_prompt(250, 3)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 18, compressor="none", **EAGER)
    for compressor in (*COMPRESSORS, "h2o(keep=0.1, refresh=8)", "quest(keep=0.1, whole=0)", "kvzip(keep=0.1)"):
        made = logits_of(model, switch, inputs, 18, compressor=compressor, **EAGER)
        assert torch.equal(first, made), compressor
    for elsewhere in ({"placement": "host", "staging_mb": 0.001}, {"placement": "disk", "compressor": "none"}):
        assert torch.equal(first, logits_of(model, switch, inputs, 18, **elsewhere, **EAGER)), elsewhere
        assert stats(model)["bytes"]["transferred"] > 0
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, compressor="streaming", **EAGER)), "random guesses"
    use_drafter(monkeypatch, wrong_guess(VOCABULARY, first))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, compressor="snapkv", **EAGER)), "wrong guesses"
    assert stats(model)["accepted"] == 0


def greedy(model: PreTrainedModel, ids: Tensor, count: int = 12, **more: Any) -> Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, **more}
    return model.generate(ids, **settings)


def prompt(tokens: int = 40) -> Tensor:
    return make_prompt(tokens)["input_ids"]


def copies_of_one_prefix(model: PreTrainedModel) -> Tensor:
    """Each goes its own way, and so does the original."""
    cache = DynamicCache(config=model.config)
    first = greedy(model, prompt(), 6, past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    others = [greedy(model, torch.cat([first, first[:, i : i + 5]], 1), past_key_values=c) for i, c in enumerate(copies)]
    return torch.cat([*others, greedy(model, first, past_key_values=cache)], dim=1)


def a_cropped_cache(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = greedy(model, prompt(), 14, past_key_values=cache)
    cache.crop(-10)
    again = torch.cat([first[:, : cache.get_seq_length()], prompt(3)], dim=1)
    return torch.cat([first, greedy(model, again, past_key_values=cache)], dim=1)


def a_cache_built_outside(model: PreTrainedModel) -> Tensor:
    cache, held = DynamicCache(config=model.config), model._compiled_call_impl
    model._compiled_call_impl = None
    with torch.no_grad():
        model(prompt()[:, :-1], past_key_values=cache)
    model._compiled_call_impl = held
    return greedy(model, prompt(), 20, past_key_values=cache)


def beams(model: PreTrainedModel) -> Tensor:
    return model.generate(**make_prompt(40, 2), num_beams=2, max_new_tokens=10, do_sample=False)


def samples(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(0)
    return greedy(model, prompt(), do_sample=True, temperature=0.6, num_return_sequences=2)


def a_static_cache(model: PreTrainedModel) -> Tensor:
    return model.generate(**make_prompt(40, 3), max_new_tokens=20, do_sample=False, cache_implementation="static")


CALLERS = [copies_of_one_prefix, a_cropped_cache, a_cache_built_outside, beams, samples, a_static_cache]


@pytest.mark.parametrize("call", CALLERS)
def test_a_callers_cache_may_go_any_way(call: Callable[[PreTrainedModel], Tensor]) -> None:
    model = make_latent(**DENSE)
    plain = call(model)
    model.compile(backend="vericache", options={"compressor": "snapkv(keep=0.3, window=8)", "strict": True, **EAGER})
    assert torch.equal(call(model), plain)
    assert stats(model)["rounds"] > 0
