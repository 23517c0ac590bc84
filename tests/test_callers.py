"""Whatever the caller does with the model and its cache, the tokens are those of the uncompiled model."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import OPTIONS, Caller, both, greedy, prompt, step_by_step
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats


def greedy_generate(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt())


def sampling(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(3)
    return greedy(model, prompt(), do_sample=True, temperature=0.5)


def several_samples(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(3)
    return greedy(model, prompt(), do_sample=True, num_return_sequences=3)


def logits_processors(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), repetition_penalty=1.3, no_repeat_ngram_size=2)


def second_turn(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = greedy(model, prompt(), past_key_values=cache)
    return greedy(model, torch.cat([first, prompt(7)], dim=1), past_key_values=cache)


def crop_and_go_on(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = greedy(model, prompt(), past_key_values=cache)
    cache.crop(-9)
    return greedy(model, torch.cat([first[:, : cache.get_seq_length()], prompt(1)], dim=1), past_key_values=cache)


def hand_written_loop(model: PreTrainedModel) -> Tensor:
    return torch.cat(step_by_step(model, DynamicCache(config=model.config), prompt(), 30), dim=1)


def two_caches_interleaved(model: PreTrainedModel) -> Tensor:
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    fed = [prompt(), prompt(25).flip(1)]
    out = []
    for _ in range(30):
        for i, cache in enumerate(caches):
            fed[i] = step_by_step(model, cache, fed[i], 1)[0]
            out.append(fed[i])
    return torch.cat(out, dim=1)


def cache_from_the_uncompiled_model(model: PreTrainedModel) -> Tensor:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    cache = DynamicCache(config=model.config)
    first = step_by_step(model, cache, prompt(), 10)
    model._compiled_call_impl = compiled
    return torch.cat(first + step_by_step(model, cache, first[-1], 25), dim=1)


def reset_half_way(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = step_by_step(model, cache, prompt(), 15)
    torch.compiler.reset()
    return torch.cat(first + step_by_step(model, cache, first[-1], 15), dim=1)


def padded_batch_that_ends_early(model: PreTrainedModel) -> Tensor:
    inputs = make_prompt(40, 3)
    end = int(model.generate(**inputs, max_new_tokens=12, do_sample=False)[1, 48])
    return model.generate(**inputs, max_new_tokens=50, do_sample=False, eos_token_id=end)


def chunked_prefill(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), prefill_chunk_size=7)


def hidden_states_too(model: PreTrainedModel) -> Tensor:
    out = greedy(model, prompt(), return_dict_in_generate=True, output_hidden_states=True, output_scores=True)
    return torch.cat([step[-1][:, -1] for step in out.hidden_states])


def early_stop_and_again(model: PreTrainedModel) -> Tensor:
    stopped = greedy(model, prompt(), count=3)
    return torch.cat([stopped, greedy(model, prompt())], dim=1)


def static_cache(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), cache_implementation="static")


TAKEN: list[Caller] = [
    greedy_generate, sampling, several_samples, logits_processors, second_turn, crop_and_go_on, hand_written_loop,
    two_caches_interleaved, cache_from_the_uncompiled_model, reset_half_way, padded_batch_that_ends_early,
    chunked_prefill, early_stop_and_again, static_cache,
]  # fmt: skip


def mask_with_holes(model: PreTrainedModel) -> Tensor:
    ids = prompt().repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 5:9] = 0
    return greedy(model, ids, attention_mask=mask)


def right_padding(model: PreTrainedModel) -> Tensor:
    ids = prompt().repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    return greedy(model, ids, attention_mask=mask)


def embeddings_in(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        embedded = model.get_input_embeddings()(prompt())
    return model.generate(
        inputs_embeds=embedded, attention_mask=torch.ones_like(prompt()), max_new_tokens=20, do_sample=False
    )


def prompt_lookup(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), prompt_lookup_num_tokens=3)


def no_cache(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), count=10, use_cache=False)


def loop_with_gradients(model: PreTrainedModel) -> Tensor:
    cache, ids, out = DynamicCache(config=model.config), prompt(), []
    for _ in range(6):
        ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(ids)
    return torch.cat(out, dim=1)


LEFT: list[Caller] = [
    mask_with_holes, right_padding, embeddings_in, prompt_lookup, no_cache, loop_with_gradients,
]  # fmt: skip


LEARNED: list[Caller] = [second_turn, crop_and_go_on, padded_batch_that_ends_early]
"""What learned positions could go wrong in; gpt2's other callers are slow tests."""


@functools.cache
def shared() -> PreTrainedModel:
    """One compiled model for all of these callers."""
    model = make_tiny("llama")
    model.compile(backend="vericache", options=OPTIONS)
    greedy_generate(model)
    return model


@pytest.mark.parametrize("call", TAKEN, ids=lambda call: call.__name__)
def test_caller_gets_plain_tokens_from_rounds(call: Caller) -> None:
    model = shared()
    before = stats(model)["rounds"]
    assert torch.equal(call(model), call(make_tiny("llama")))
    assert stats(model)["rounds"] > before
    assert stats(model)["graphs"]["not taken"] == 0


@pytest.mark.parametrize(
    "call",
    [call if call in LEARNED else pytest.param(call, marks=pytest.mark.slow) for call in TAKEN],
    ids=lambda call: call.__name__,
)
def test_caller_with_learned_positions_gets_plain_tokens_from_rounds(call: Caller) -> None:
    plain, ours, model = both(call, "gpt2")
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 0
    assert stats(model)["graphs"]["not taken"] == 0


def test_other_row_outputs_come_from_rounds_too() -> None:
    """Hidden states of every layer are handed out row by row, like logits."""
    plain, ours, model = both(hidden_states_too, "llama")
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert stats(model)["rounds"] > 0


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, marks=pytest.mark.slow) if call is prompt_lookup else call for call in LEFT],
    ids=lambda call: call.__name__,
)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_caller_outside_the_fast_path_gets_plain_tokens(name: str, call: Caller) -> None:
    plain, ours, _ = both(call, name)
    assert torch.equal(ours, plain)


def test_past_the_last_position_the_plain_error_is_raised() -> None:
    """gpt2 has 64 positions: vericache serves them all, drafts past them harmlessly, then fails as plain does."""
    model = make_tiny("gpt2", positions=64)
    with pytest.raises(IndexError):
        greedy(make_tiny("gpt2", positions=64), prompt(), count=40)
    plain = greedy(make_tiny("gpt2", positions=64), prompt(), count=24)
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(greedy(model, prompt(), count=24), plain)
    with pytest.raises(IndexError):
        greedy(model, prompt(), count=40)


def test_the_callers_cache_holds_no_data() -> None:
    """After prefill and after decoding, all cache tensors together hold one column."""
    model, cache = make_tiny("llama"), None
    model.compile(backend="vericache", options=OPTIONS)
    cache = DynamicCache(config=model.config)
    for count in (1, 20):
        greedy(model, prompt(1000), count=count, past_key_values=cache)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in cache.layers
            for t in (layer.keys, layer.values)
        }
        assert cache.get_seq_length() >= 1000
        assert sum(held.values()) <= 2 * 2 * 2 * 16 * 4, "more than one column is allocated"
        assert all(t.isnan().all() for layer in cache.layers for t in (layer.keys, layer.values))
        cache = DynamicCache(config=model.config)


@pytest.mark.slow
@pytest.mark.own_captures
def test_a_recompile_storm_never_reaches_dynamos_limit() -> None:
    """Past its limit Dynamo would run the model on hollow caches; the limit is raised before that."""
    model, limit = make_tiny("llama"), 4
    plain = greedy(model, prompt())
    with torch._dynamo.config.patch(recompile_limit=limit):  # whatever other tests have raised it to
        for keep in (0.1, 0.2, 0.3):
            model.compile(backend="vericache", options={**OPTIONS, "keep": keep})
            assert torch.equal(greedy(model, prompt()), plain)
            assert stats(model)["rounds"] > 0
        assert torch._dynamo.config.recompile_limit > limit


@pytest.mark.slow
@pytest.mark.own_captures
def test_a_thread_has_not_reached_dynamos_limit_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of Dynamo's is its thread's own; what one thread compiled counts in all."""
    model, limits = make_tiny("llama"), ("recompile_limit", "accumulated_recompile_limit")
    steps = torch.no_grad()(step_by_step)
    plain = steps(model, DynamicCache(config=model.config), prompt(), 21)
    for name in limits:
        monkeypatch.setattr(vars(torch._dynamo.config)["_config"][name], "default", 8)
    with torch._dynamo.config.patch(dict.fromkeys(limits, 64)), ThreadPoolExecutor(1) as thread:
        for window in (2, 4, 16, 32, 8):
            model.compile(backend="vericache", options={**OPTIONS, "window": window})
            cache = DynamicCache(config=model.config)
            given = steps(model, cache, prompt(), 1 if window == 8 else 21)
            assert torch.equal(torch.cat(given), torch.cat(plain[: len(given)]))
        given += thread.submit(steps, model, cache, given[-1], 20).result()
    assert torch.equal(torch.cat(given), torch.cat(plain))


@torch.no_grad()
def embeddings_after_tokens(model: PreTrainedModel) -> Tensor:
    """Decode steps that are refused, over a cache that a taken graph left without data."""
    cache, embed = DynamicCache(config=model.config), model.get_input_embeddings()
    tokens = step_by_step(model, cache, prompt(), 5)
    for _ in range(5):
        logits = model(inputs_embeds=embed(tokens[-1]), past_key_values=cache).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


@pytest.mark.slow
def test_a_graph_not_taken_runs_under_inductor_on_a_cache_without_data() -> None:
    plain, ours, model = both(embeddings_after_tokens, "llama", inductor=True)
    assert torch.equal(ours, plain)
    assert stats(model)["graphs"]["not taken"] > 0


@torch.no_grad()
def weights_that_change(model: PreTrainedModel) -> Tensor:
    """The last layer's weights are changed in place between two steps of one loop, as by a merged adapter."""
    cache = DynamicCache(config=model.config)
    tokens = step_by_step(model, cache, prompt(), 5)
    for weight in (model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return torch.cat([*tokens, *step_by_step(model, cache, tokens[-1], 10)], dim=1)


def test_rows_computed_ahead_are_dropped_when_weights_change() -> None:
    plain, ours, model = both(weights_that_change, "llama")
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 1


@torch.no_grad()
def weights_that_are_replaced(model: PreTrainedModel) -> Tensor:
    """As `load_state_dict(assign=True)` does it: other parameters, in the same graphs."""
    tokens = [greedy(model, prompt(), count=12)]
    fresh = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    model.lm_head.weight = torch.nn.Parameter(fresh, requires_grad=model.lm_head.weight.requires_grad)
    return torch.cat([*tokens, greedy(model, prompt(), count=12)], dim=1)


def test_rounds_read_the_weights_that_the_model_has_now() -> None:
    plain, ours, model = both(weights_that_are_replaced, "llama")
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 1


@pytest.mark.parametrize(
    "options",
    [pytest.param({"compressor": "kivi"}, marks=pytest.mark.slow), {"keep": 0.3, "placement": "host"}],
    ids=str,
)
def test_padding_that_the_caller_stops_to_mask(options: dict[str, Any]) -> None:
    """The draft cache was made for rows that begin later than they now do."""

    @torch.no_grad()
    def drive(model: Any) -> Tensor:
        cache, ids, mask = DynamicCache(), prompt(tokens=400), torch.ones(1, 400, dtype=torch.int64)
        mask[:, :250] = 0
        tokens = []
        for step in range(150):
            shown = {"attention_mask": mask} if step < 4 else {}
            positions = torch.tensor([[400 + step - 1]]) if step else torch.arange(400)[None]
            out = model(input_ids=ids, position_ids=positions, past_key_values=cache, **shown)
            ids, mask = out.logits[:, -1:].argmax(-1), torch.cat([mask, mask.new_ones(1, 1)], 1)
            tokens.append(ids)
        return torch.cat(tokens, 1)

    model = make_tiny("llama")
    plain = drive(model)
    model.compile(backend="vericache", options={"inductor": False, "window": 8, **options})
    assert torch.equal(drive(model), plain)


def test_a_mask_that_gets_no_rounds_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make_tiny("llama"), prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    model.compile(backend="vericache", options=OPTIONS)
    with caplog.at_level("WARNING", logger="vericache_compile"):
        ours = greedy(model, ids, attention_mask=mask, count=5)
    assert torch.equal(ours, greedy(make_tiny("llama"), ids, attention_mask=mask, count=5))
    said = [record.message for record in caplog.records if "holes" in record.message]
    assert len(said) == 1
    assert "where:" in said[0]
    assert "fix:" in said[0]


def test_parameters_of_a_compiled_model_are_saved_as_parameters(tmp_path: Path) -> None:
    model = make_tiny("llama")
    model.compile(backend="vericache", options=OPTIONS)
    greedy(model, prompt(), count=3)
    torch.save(list(model.parameters()), tmp_path / "parameters.pt")
    loaded = torch.load(tmp_path / "parameters.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded, model.parameters(), strict=True))
    fresh = make_tiny("llama")
    fresh.lm_head.weight = loaded[-1]
    fresh.compile(backend="vericache", options=OPTIONS)
    assert greedy(fresh, prompt(), count=3).shape == (1, 43)
