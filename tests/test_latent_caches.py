"""Models that cache a latent (multi-head latent attention): plain tokens, canonical bits, and caches that are copied,
cropped, reordered or built outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Switch
from test_canonical import compiled, logits_of, random_guess, use_drafter, wrong_guess
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from vericache_compile import stats
from vericache_compile.errors import VericacheError
from vericache_compile.learning import calibrate
from vericache_compile.sweep_models import LAYERS, VOCABULARY, make_model

pytestmark = pytest.mark.skipif(
    not hasattr(DeepseekV3Attention, "expand_kv"), reason="this version of transformers caches keys and values"
)
EAGER = {"window": 8, "inductor": False, "draft_dtype": "same"}
SIZES = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
"""All different, so that nothing taken for something else fits."""
DENSE = {"first_k_dense_replace": LAYERS}
"""No layer with experts."""
BYTES_PER_TOKEN = LAYERS * (24 + 8) * 4
COMPRESSORS = ["snapkv(keep=0.3, window=8)", "kivi(bits=2, group=8)", "streaming(keep=0.1)"]


def make_latent(attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    torch._dynamo.reset()
    return make_model("deepseek_v3", attention, **SIZES | changes)


def make_prompt(tokens: int, batch: int = 1) -> dict[str, Tensor]:
    """Rows after the first are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        mask[b, : 7 * b] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("attention", "changes", "batch", "compressors"),
    [
        pytest.param("sdpa", {}, 3, ["none"], marks=pytest.mark.slow),
        pytest.param(
            "eager", {"q_lora_rank": None} | DENSE, 3, ["none", "streaming(keep=0.1)"], marks=pytest.mark.slow
        ),
        ("sdpa", {"rope_interleave": False} | DENSE, 3, COMPRESSORS),
        pytest.param("sdpa", DENSE, 1, ["none"], marks=pytest.mark.slow),
        pytest.param("sdpa", {}, 1, COMPRESSORS, marks=pytest.mark.slow),
        pytest.param("eager", {}, 3, COMPRESSORS, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_plain_generate(
    attention: str, changes: dict[str, Any], batch: int, compressors: list[str]
) -> None:
    model, switch, inputs = make_latent(attention, **changes), Switch(), make_prompt(60, batch)
    plain = model.generate(**inputs, max_new_tokens=25, do_sample=False)
    model.compile(backend=switch)
    for compressor in compressors:
        switch.options = {"compressor": compressor, **EAGER}
        assert torch.equal(model.generate(**inputs, max_new_tokens=25, do_sample=False), plain), compressor
        found = stats(model)
        assert (found["not_taken"], found["graphs"]["not taken"], found["rounds"] > 0) == ([], 0, True)
        assert compressor != "none" or found["tokens_per_round"] == 8


def assert_held_once(model: PreTrainedModel, columns: int) -> None:
    """Values are a part of the keys, and the counts say what is allocated."""
    found = stats(model)["bytes"]
    assert (found["per_token_full"], found["full"]) == (BYTES_PER_TOKEN, columns * BYTES_PER_TOKEN)
    if stats(model)["compressor"] == "NoCompression()":
        assert found["draft"] < columns * BYTES_PER_TOKEN


def test_rows_are_bit_equal_whatever_drafts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_latent(**DENSE), make_prompt(250, 3)
    plain = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    ).logits[0]
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 18, compressor="none", **EAGER)
    assert torch.equal(first[0], plain), "prefill's rows are plain's"
    assert_held_once(model, 3 * 512)
    for compressor in (*COMPRESSORS, "h2o(keep=0.1, refresh=8)"):
        made = logits_of(model, switch, inputs, 18, compressor=compressor, **EAGER)
        assert torch.equal(first, made), compressor
    for elsewhere in ({"placement": "host", "staging_mb": 0.001}, {"placement": "disk", "compressor": "none"}):
        assert torch.equal(first, logits_of(model, switch, inputs, 18, **elsewhere, **EAGER)), elsewhere
        assert stats(model)["bytes"]["transferred"] > 0
        assert_held_once(model, 3 * 512)
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, compressor="streaming", **EAGER)), "random guesses"
    use_drafter(monkeypatch, wrong_guess(VOCABULARY, first))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, compressor="snapkv", **EAGER)), "wrong guesses"
    assert stats(model)["accepted"] == 0


@pytest.mark.slow
def test_rows_are_bit_equal_with_experts_and_in_compiled_segments() -> None:
    model, inputs = make_latent(), make_prompt(250, 3)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 10, compressor="none", window=8)
    assert stats(model)["rounds"] > 0
    assert torch.equal(first, logits_of(model, switch, inputs, 10, compressor="streaming", window=8))


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
    asked = [torch.cat([first, first[:, i : i + 5]], dim=1) for i in range(2)]
    others = [greedy(model, ids, past_key_values=own) for ids, own in zip(asked, copies, strict=True)]
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
    return model.generate(**make_prompt(40, 2), num_beams=2, max_new_tokens=8, do_sample=False)


def a_static_cache(model: PreTrainedModel) -> Tensor:
    return model.generate(**make_prompt(40, 3), max_new_tokens=20, do_sample=False, cache_implementation="static")


@pytest.mark.parametrize(
    "calls",
    [
        [a_cropped_cache],
        [a_static_cache],
        pytest.param([copies_of_one_prefix, a_cache_built_outside, beams], marks=pytest.mark.slow),
    ],
)
def test_a_callers_cache_may_go_any_way(calls: list[Callable[[PreTrainedModel], Tensor]]) -> None:
    model = make_latent(**DENSE)
    plain = [call(model) for call in calls]
    model.compile(backend="vericache", options={"compressor": "snapkv(keep=0.3, window=8)", "strict": True, **EAGER})
    rounds = [0]
    for call, expected in zip(calls, plain, strict=True):
        assert torch.equal(call(model), expected), call.__name__
        rounds.append(stats(model)["rounds"])
        assert rounds[-1] > rounds[-2], call.__name__


def test_a_graph_that_is_not_taken_gets_the_cached_latents() -> None:
    """Steps by embeddings go on from a cache without data, and a compiled step from theirs."""

    def decode(model: PreTrainedModel) -> Tensor:
        cache = DynamicCache(config=model.config)
        first = greedy(model, prompt(), 6, past_key_values=cache)
        with torch.no_grad():
            embedded = model.get_input_embeddings()(first[:, -1:])
            return model(inputs_embeds=embedded, past_key_values=cache).logits

    model = make_latent(**DENSE)
    plain = decode(model)
    model.compile(backend="vericache", options={"compressor": "none", **EAGER})
    torch.testing.assert_close(decode(model), plain, atol=1e-4, rtol=1e-4)
    assert stats(model)["graphs"]["not taken"] == 1


def test_a_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VericacheError, match="a latent cache, of which no method learns yet"):
        calibrate(make_latent(**DENSE), make_prompt(40)["input_ids"], "cskv", tmp_path / "file")
