"""The laws: rows come from verify or prefill, only they write full KV, and compressed KV is derived from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny
from test_canonical import logits_of, shared
from torch import Tensor
from transformers import DynamicCache

from vericache_compile import stats
from vericache_compile.compressors.low_rank import LowRank
from vericache_compile.runtime import rounds
from vericache_compile.runtime.caches import DraftKV
from vericache_compile.runtime.pace import Pace

OPTIONS: dict[str, Any] = {"window": 8, "inductor": False}


@pytest.mark.parametrize(
    ("poison", "batch"),
    [("nan", 3), ("noise", 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("nan", 1), ("noise", 3)))],
)
@pytest.mark.parametrize("compressor", ["none", "streaming", "snapkv", "kivi"])
def test_a_poisoned_draft_never_changes_a_row(
    compressor: str, poison: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 1: whatever the compressed cache holds, the rows stay the same to the bit."""
    (model, switch), inputs = shared("llama", "law 1", batch), make_prompt(300, batch)
    expected = logits_of(model, switch, inputs, 30, compressor="none", **OPTIONS)
    original = rounds.prepare_draft
    poisoned: list[int] = []

    def prepare_draft(*args: Any, **kwargs: Any) -> DraftKV:
        draft = original(*args, **kwargs)
        for layer in draft.layers:
            for held in (layer.keys, layer.values):
                held.copy_(torch.full_like(held, float("nan")) if poison == "nan" else torch.randn_like(held) * 100)
        poisoned.append(len(draft.layers))
        return draft

    monkeypatch.setattr(rounds, "prepare_draft", prepare_draft)
    assert torch.equal(expected, logits_of(model, switch, inputs, 30, compressor=compressor, **OPTIONS))
    assert poisoned, "no draft was poisoned"


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_a_region_that_attends_itself_never_changes_a_row(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1 again: nor does what it gives in place of attention; where it is right, drafts are as without it."""
    (model, switch), inputs = shared("llama", "law 1", 3), make_prompt(300, 3)
    expected = logits_of(model, switch, inputs, 30, compressor="none", **OPTIONS)
    monkeypatch.setattr(Pace, "note", lambda *_: None)  # whether drafting rests is the clock's to say
    attend, asked, accepted = LowRank.attend, list[Tensor](), []

    def note(*args: Any) -> Tensor:
        asked.append(attend(*args))
        return asked[-1]

    def spoil(*args: Any) -> Tensor:
        return torch.full_like(attend(*args), poison)

    logits_of(model, switch, inputs, 1, compressor="recalkv(rank=0.8)", **OPTIONS)  # stats are of it from here on
    for own in (note, None, spoil):
        monkeypatch.setattr(LowRank, "attends", lambda *_, own=own: own is not None)
        monkeypatch.setattr(LowRank, "attend", own)
        before = stats(model)["accepted"]
        assert torch.equal(expected, logits_of(model, switch, inputs, 30, compressor="recalkv(rank=0.8)", **OPTIONS))
        accepted.append(stats(model)["accepted"] - before)
    assert len(asked) > 100
    assert accepted[0] == accepted[1] > accepted[2]


@pytest.mark.parametrize("compressor", ["none", "streaming", "snapkv", "kivi", "quest(whole=0)"])
def test_drafting_leaves_full_kv_alone(compressor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 2: the bytes of the full cache are the same before and after drafting."""
    model, switch = shared("llama", "law 2")
    original = rounds.draft_tokens
    compared: list[int] = []

    def draft_tokens(sequence: Any, *args: Any) -> Tensor:
        before = [x.clone() for x in (*sequence.full.keys, *sequence.full.values)]
        drafted = original(sequence, *args)
        after = (*sequence.full.keys, *sequence.full.values)
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
        compared.append(len(before))
        return drafted

    monkeypatch.setattr(rounds, "draft_tokens", draft_tokens)
    logits_of(model, switch, make_prompt(300), 30, compressor=compressor, **OPTIONS)
    assert len(compared) == stats(model)["rounds"] > 0


@pytest.mark.parametrize("compressor", ["none", "streaming", "snapkv", "kivi"])
def test_tails_are_exact_copies_of_full_kv(compressor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: at the start of each round every tail holds the full cache's own keys and values, to the bit."""
    model, switch = shared("llama", "law 3")
    original = rounds.draft_tokens
    tails: list[int] = []

    def draft_tokens(sequence: Any, draft: DraftKV, *args: Any) -> Tensor:
        for number, layer in enumerate(draft.layers):
            for b, (row, start) in enumerate(zip(sequence.rows, layer.starts, strict=True)):
                tail = slice(layer.offset, layer.offset + row.length - start)
                own = slice(start, row.length)
                assert torch.equal(layer.keys[b, :, tail], sequence.full.keys[number][b, :, own])
                assert torch.equal(layer.values[b, :, tail], sequence.full.values[number][b, :, own])
                tails.append(row.length - start)
        return original(sequence, draft, *args)

    monkeypatch.setattr(rounds, "draft_tokens", draft_tokens)
    logits_of(model, switch, make_prompt(300, 3), 200, compressor=compressor, **OPTIONS)
    assert max(tails) > 0


@pytest.mark.parametrize("tokens", [5, 400])
def test_tails_are_exact_after_a_second_turn(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3 where a second turn's tokens, few or many, came between two rounds."""
    model = make_tiny("llama")
    model.compile(backend="vericache", options={**OPTIONS, "compressor": "streaming", "keep": 0.2})
    original = rounds.draft_tokens
    lengths: list[int] = []

    def draft_tokens(sequence: Any, draft: DraftKV, *args: Any) -> Tensor:
        for number, layer in enumerate(draft.layers):
            [row], [start] = sequence.rows, layer.starts
            tail = slice(layer.offset, layer.offset + row.length - start)
            assert torch.equal(layer.keys[0, :, tail], sequence.full.keys[number][0, :, start : row.length])
            lengths.append(row.length)
        return original(sequence, draft, *args)

    monkeypatch.setattr(rounds, "draft_tokens", draft_tokens)
    monkeypatch.setattr(Pace, "count", lambda pace, took: None)  # drafting never rests
    cache, ids = DynamicCache(config=model.config), make_prompt(300)["input_ids"]
    for _ in range(2):
        shown = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=shown, past_key_values=cache, max_new_tokens=20, do_sample=False)
        ids = torch.cat([out, make_prompt(tokens, seed=1)["input_ids"]], dim=1)
    assert min(lengths) < 330 < max(lengths)
    model._compiled_call_impl = None
    plain = model.generate(out[:, :-20], attention_mask=shown, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, plain)
