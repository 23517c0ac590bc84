"""KVSharer: which layers borrow, what they read, and that they hold nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Switch, make_prompt, make_tiny
from noted import NotingCache
from torch import Tensor
from transformers import PreTrainedModel

from vericache_compile import stats
from vericache_compile.calibration import Calibration
from vericache_compile.compressors.borrowed import Borrower
from vericache_compile.compressors.kvsharer import KVSharer, by_distance
from vericache_compile.compressors.none import NoCompression
from vericache_compile.errors import OptionError
from vericache_compile.plan import Site
from vericache_compile.runtime import caches, compression


def test_without_a_file_layers_are_paired_from_the_last_one_down() -> None:
    assert KVSharer(share=0.25).donors(8) == {7: 6, 5: 4}
    assert KVSharer(share=0.5).donors(5) == {4: 3, 2: 1}
    assert KVSharer(share=0).donors(8) == {}
    assert KVSharer(share=0.5).for_layer(3, 4) == Borrower(2)
    assert KVSharer(share=0.5).for_layer(2, 4) == NoCompression()


def test_without_a_file_half_of_the_layers_borrow_at_most() -> None:
    sites = [Site(layer, 4, 2, 16, 16, 0.25, torch.float32, None) for layer in range(8)]
    KVSharer(share=0.5).check_model(sites, [])
    with pytest.raises(OptionError) as caught:
        KVSharer(share=0.51).check_model(sites, [])
    assert caught.value.found == "share=0.51"
    assert "without a calibration file" in caught.value.where
    assert "up to 0.5" in caught.value.fix
    with pytest.raises(OptionError, match=r"share=0\.75"):
        KVSharer(share=0.75).for_layer(3, 8)


def test_with_a_file_no_more_borrow_than_it_was_calibrated_for() -> None:
    """It was for two of eight layers, and found one pair."""
    held = Calibration("f", "kvsharer", {}, "KVSharer(share=0.25, calibration=None)", {"pairs": torch.tensor([[7, 1]])})
    shared = {share: KVSharer(share=share) for share in (0.2, 0.25, 0.3, 0.5)}
    for method in shared.values():
        vars(method)["held"] = held
    for share in (0.2, 0.25, 0.3):
        assert shared[share].donors(8) == {7: 1}, "the same two layers"
    with pytest.raises(OptionError) as caught:
        shared[0.5].donors(8)
    assert caught.value.found == "share=0.5"
    assert caught.value.where == "the calibration file f"
    assert caught.value.fix.startswith("give up to 0.25, ")


def test_the_least_alike_come_first() -> None:
    means = {layer: (torch.full((2, 3), float(x)), torch.zeros(2, 3)) for layer, x in enumerate((0, 1, 5))}
    assert by_distance(means) == [(2, 0), (2, 1), (1, 0)]
    means[2] = (torch.zeros(4, 3), torch.zeros(4, 3))
    assert by_distance(means) == [(1, 0)]


def naive_pairs(model: PreTrainedModel, ids: Tensor, wanted: int, least: float) -> list[list[int]]:
    """[borrower, lender] by tokens ids [N, T]: the farthest first, each kept if last hidden states stay near."""

    def run(lenders: dict[int, int]) -> tuple[Tensor, list[Tensor]]:
        cache = NotingCache(lenders)
        with torch.no_grad():
            states = model.model(ids, past_key_values=cache).last_hidden_state
        return states, [torch.cat([keys.mean(0).flatten(), values.mean(0).flatten()]) for keys, values in cache.noted]

    own, means = run({})
    candidates = [(later, earlier) for later in range(len(means)) for earlier in range(later)]
    pairs: dict[int, int] = {}
    for later, earlier in sorted(candidates, key=lambda pair: -float(torch.dist(means[pair[0]], means[pair[1]]))):
        borrows, lends = set(pairs), set(pairs.values())
        if len(pairs) == wanted or later in borrows | lends or earlier in borrows:
            continue
        states, _ = run({**pairs, later: earlier})
        cosines = [
            float(a @ b / (a.norm() * b.norm())) for a, b in zip(states.view(-1, 64), own.view(-1, 64), strict=True)
        ]
        if sum(cosines) / len(cosines) > least:
            pairs[later] = earlier
    return [list(pair) for pair in pairs.items()]


@pytest.mark.parametrize(("least", "layers"), [(0.5, 6), (0.9, 6), (0.91, 4)])
def test_what_is_learned_equals_the_naive_loop(least: float, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cosine refuses pairs that would be taken without it."""
    monkeypatch.setattr("vericache_compile.compressors.kvsharer.COSINE", least)
    model, ids = make_tiny("llama", layers=layers), make_prompt(48)["input_ids"].view(2, 24)
    expected = naive_pairs(model, ids, layers // 2, least)
    assert KVSharer(share=0.5).learn(model, ids, ())["pairs"].tolist() == expected
    assert expected != naive_pairs(model, ids, layers // 2, -1.1)


def _full(layers: int, tokens: int) -> caches.FullKV:
    site = Site(0, 2, 2, 16, 16, 0.25, torch.float32, None)
    full = caches.FullKV([site] * layers, 1)
    full.reserve(tokens, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        full.append(layer, *torch.randn(2, 1, 2, tokens, 16, generator=generator), [0])
    return full


def _compress(method: KVSharer, full: caches.FullKV, columns: int, room: int = 8) -> caches.DraftKV:
    return compression.compress(method, full, [0], [columns], [[None]] * len(full.sites), room)


def _extend(draft: caches.DraftKV, full: caches.FullKV, begin: int, end: int) -> None:
    """With columns [begin, end) written to the tails first."""
    for held, keys, values in zip(draft.layers, full.keys, full.values, strict=True):
        held.write(keys[:, :, begin:end], values[:, :, begin:end], [begin])
    compression.extend(draft, full, [0], [end], [[None]] * len(full.sites), 8)


def test_a_borrower_reads_the_lenders_region_and_its_own_tail() -> None:
    full = _full(4, 160)
    draft = _compress(KVSharer(share=0.25), full, 60, room=100)
    for columns, covered in ((60, 60), (150, 118)):
        if columns > 60:
            _extend(draft, full, 60, columns)
        (mine, _, seen), (theirs, _, _) = (draft.layers[layer].read([columns]) for layer in (3, 2))
        assert seen.rights == (columns,)
        assert torch.equal(mine[:, :, :covered], theirs[:, :, :covered])
        assert torch.equal(mine[:, :, covered:columns], full.keys[3][:, :, covered:columns])
    assert draft.layers[3].starts == draft.layers[2].starts == [118]


def test_a_borrower_takes_the_bytes_of_its_tail_only() -> None:
    full = _full(4, 512)
    shared, alone = _compress(KVSharer(share=0.25), full, 512), _compress(KVSharer(share=0), full, 512)
    assert shared.layers[3].nbytes == 2 * 2 * 8 * 16 * 4
    assert shared.nbytes == alone.nbytes - 2 * 2 * 512 * 16 * 4


@pytest.fixture(scope="module")
def switched() -> tuple[PreTrainedModel, Switch]:
    model, switch = make_tiny("llama"), Switch()
    model.compile(backend=switch)
    return model, switch


@pytest.mark.parametrize("compressor", ["kvsharer(share=0.5)", "0: none, rest: kvsharer(share=0.34)"])
def test_tokens_are_plain_whatever_is_shared(
    switched: tuple[PreTrainedModel, Switch], compressor: str, plain_tokens: Any
) -> None:
    model, switch = switched
    switch.options = {"compressor": compressor, "window": 4, "inductor": False}
    ours = model.generate(**make_prompt(300, 3), max_new_tokens=30, do_sample=False)
    assert torch.equal(ours, plain_tokens("llama", 300, 3, 30))
    assert stats(model)["rounds"] > 0
    assert stats(model)["bytes"]["draft"] < stats(model)["bytes"]["full"]


@pytest.mark.parametrize("wrong", [{"share": 1}, {"share": -0.1}, {"calibration": "missing.safetensors"}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"share=|missing\.safetensors"):
        KVSharer(**wrong)
