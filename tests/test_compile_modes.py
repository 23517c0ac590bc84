"""However the model is compiled, typed, copied or called from, its tokens are those of the uncompiled model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from callers import OPTIONS, greedy, prompt, step_by_step
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.runtime import drafting
from vericache_compile.runtime.pace import Pace


def compiled(dtype: torch.dtype = torch.float32, seed: int = 0, **given: Any) -> PreTrainedModel:
    """A tiny llama, compiled by this backend."""
    model = make_tiny("llama", seed=seed).to(dtype)
    model.compile(backend="vericache", options=OPTIONS, **given)
    return model


@pytest.mark.parametrize(
    "given",
    [{"fullgraph": True}, {"dynamic": True}, pytest.param({"dynamic": False}, marks=pytest.mark.slow)],
    ids=str,
)
def test_dynamos_modes(given: dict[str, Any]) -> None:
    """Whatever Dynamo is told of shapes, ghosts say themselves that their columns vary."""
    model = compiled(**given)
    assert torch.equal(greedy(model, prompt(), count=20), greedy(make_tiny("llama"), prompt(), count=20))
    assert stats(model)["graphs"]["not taken"] == 0
    assert stats(model)["rounds"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_sixteen_bit_weights(dtype: torch.dtype) -> None:
    model = compiled(dtype)
    assert torch.equal(greedy(model, prompt(), count=16), greedy(make_tiny("llama").to(dtype), prompt(), count=16))
    assert stats(model)["rounds"] > 0


def test_autocast() -> None:
    """Keys and values are cached in the type that they are computed in."""
    with torch.autocast("cpu", torch.bfloat16):
        plain, model = greedy(make_tiny("llama"), prompt(), count=16), compiled()
        assert torch.equal(greedy(model, prompt(), count=16), plain)
    assert stats(model)["rounds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("inductor", [False, True])
def test_methods_that_multiply_keep_the_caches_type_under_autocast(
    inductor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole basis loses nothing, so drafts are those over the whole cache; in autocast and, later, out of it."""
    monkeypatch.setattr(drafting, "CHUNK", 8)
    monkeypatch.setattr(Pace, "note", lambda *_: None)
    accepted = []
    for compressor in ("none", "recalkv(rank=1.0, residual=0)"):
        model, fed = make_tiny("llama"), make_prompt(200)["input_ids"]
        model.compile(backend="vericache", options={"window": 4, "compressor": compressor, "inductor": inductor})
        cache = DynamicCache(config=model.config)
        for step in range(48):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=step < 24):
                fed = model(fed, past_key_values=cache).logits[:, -1:].argmax(-1)
        accepted.append(stats(model)["accepted"])
    assert accepted[1] >= 0.8 * accepted[0] > 20


def test_inference_mode_and_out_of_it() -> None:
    """Caches made in one mode serve the other."""

    def decode(model: PreTrainedModel) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            tokens = step_by_step(model, cache, prompt(), 12)
        return torch.cat([*tokens, *step_by_step(model, cache, tokens[-1].clone(), 12)], dim=1)

    model = compiled()
    assert torch.equal(decode(model), decode(make_tiny("llama")))
    assert stats(model)["rounds"] > 0


@pytest.mark.slow
def test_several_models_share_what_dynamo_compiled() -> None:
    models = [compiled(seed=seed) for seed in (0, 1)]
    for _ in range(2):
        for seed, model in enumerate(models):
            assert torch.equal(greedy(model, prompt()), greedy(make_tiny("llama", seed=seed), prompt()))
    assert all(stats(model)["rounds"] > 0 for model in models)


def test_threads() -> None:
    """Two threads decode on one model, two on another; each has caches of its own."""
    models = [compiled(seed=seed) for seed in (0, 1)]
    plain = [[greedy(make_tiny("llama", seed=seed), prompt().roll(i, 1)) for i in range(2)] for seed in (0, 1)]
    for model in models:
        greedy(model, prompt(), count=5)
    with ThreadPoolExecutor(4) as pool:
        asked = [[pool.submit(greedy, model, prompt().roll(i, 1)) for i in range(2)] for model in models]
        for row, expected in zip(asked, plain, strict=True):
            for one, tokens in zip(row, expected, strict=True):
                assert torch.equal(one.result(), tokens)
    assert all(stats(model)["rounds"] > 10 and not stats(model)["graphs"]["not taken"] for model in models)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    twin._compiled_call_impl = None
    return twin


def saved(model: PreTrainedModel) -> PreTrainedModel:
    """What comes back from a file, which holds nothing of what was compiled."""
    file, fresh = io.BytesIO(), io.BytesIO()
    torch.save(model, file)
    torch.save(make_tiny("llama"), fresh)
    assert file.tell() < 1.1 * fresh.tell()
    file.seek(0)
    back: PreTrainedModel = torch.load(file, weights_only=False)
    return back


@pytest.mark.parametrize("copy_of", [copied, saved])
def test_a_copied_model_is_one_of_its_own(copy_of: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = compiled()
    plain = greedy(model, prompt())
    twin = copy_of(model)
    assert torch.equal(greedy(twin, prompt()), plain)
    twin.compile(backend="vericache", options=OPTIONS)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(greedy(twin, prompt()), plain), "it has weights of its own"
    assert stats(twin)["rounds"] > 0
    assert torch.equal(greedy(model, prompt()), plain)


def test_a_reset_compiler_starts_anew() -> None:
    model = compiled()
    plain = greedy(model, prompt())
    before = stats(model)["graphs"]["decode"]
    torch.compiler.reset()
    assert torch.equal(greedy(model, prompt()), plain)
    assert stats(model)["graphs"]["decode"] == before + 1


@pytest.mark.own_captures
def test_growing_lengths_and_many_prompts_are_captured_once() -> None:
    """500 tokens at growing lengths, then 20 prompts of different lengths: two prefills and one decode step."""
    model = compiled()
    greedy(model, prompt(), count=500)
    for tokens in range(3, 43, 2):
        greedy(model, prompt(tokens), count=3)
    graphs = stats(model)["graphs"]
    assert graphs["decode"] == 1
    assert graphs["captured"] <= 2
    assert graphs["not taken"] == 0
