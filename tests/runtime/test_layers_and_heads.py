"""Sites with methods of their own, and heads that keep different counts: what the draft's attention sees of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.layer_budget import pyramid_share
from vericache_compile.compressors.pyramidkv import PyramidKV
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.spec import parse
from vericache_compile.plan import Site
from vericache_compile.runtime.attention import attend_compressed
from vericache_compile.runtime.caches import DraftKV, FullKV
from vericache_compile.runtime.compression import compress, extend

Sites = Callable[..., list[Site]]
Fill = Callable[..., None]
PADS, COLUMNS = [0, 10, 60], [300, 290, 75]


def queries_of(full: FullKV) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(s.heads, 32, s.head_size, generator=generator).to(s.dtype) for _ in range(full.batch)]
        for s in full.sites
    ]


def make(method: Compressor, full: FullKV) -> DraftKV:
    return compress(method, full, PADS, COLUMNS, queries_of(full), 50)


@pytest.fixture
def full(make_sites: Sites, fill: Fill) -> FullKV:
    """Rows of random keys, head 0 of which draws more attention to fewer tokens."""
    made = FullKV(make_sites(), len(PADS))
    fill(made, 0, max(COLUMNS))
    made.reserve(2 * max(COLUMNS), torch.device("cpu"))
    for keys in made.keys:
        keys[:, 0, ::9] *= 4
    return made


def own_keys(draft: DraftKV, full: FullKV, layer: int, row: int, head: int, side: int) -> Tensor:
    """What a head of a row has to see: its region, then its tail from the full cache."""
    held = draft.layers[layer]
    region = held.regions[row]
    counts = region.head_slots
    assert counts is not None
    kept = region.materialize()[side][head, region.slots - counts[head] :]
    exact = (full.keys, full.values)[side][layer][row, head, held.starts[row] : COLUMNS[row]]
    return torch.cat([kept, exact])


def test_each_head_attends_to_its_own_tokens(full: FullKV) -> None:
    draft = make(AdaKV(keep=0.2), full)
    for layer, site in enumerate(full.sites):
        assert len(set(draft.layers[layer].regions[0].head_slots or ())) > 1
        keys, values, visible = draft.layers[layer].read(COLUMNS)
        assert len(set(visible.lefts[0])) > 1
        q = torch.randn(3, site.heads, 1, site.head_size, generator=torch.Generator().manual_seed(1)).to(site.dtype)
        out = attend_compressed(q, keys, values, visible, site.scale, {})
        for row in range(3):
            for head in range(site.heads):
                group = head * site.kv_heads // site.heads
                k, v = (own_keys(draft, full, layer, row, group, side)[None] for side in (0, 1))
                expected = F.scaled_dot_product_attention(q[row, head][None], k, v, scale=site.scale)
                torch.testing.assert_close(out[row, head], expected[0], atol=1e-5, rtol=1e-5)


def test_ragged_memory_is_what_heads_keep(full: FullKV) -> None:
    draft = make(AdaKV(keep=0.2), full)
    for held, site in zip(draft.layers, full.sites, strict=True):
        kept = sum(sum(region.head_slots or ()) for region in held.regions)
        assert kept == site.kv_heads * (54 + 50)
        buffers = held.keys.nbytes + held.values.nbytes
        assert held.nbytes == buffers + kept * (site.head_size + site.value_size) * site.dtype.itemsize


def test_ragged_regions_grow(full: FullKV) -> None:
    draft = make(AdaKV(keep=0.2), full)
    for held in draft.layers:
        shape = (len(PADS), held.keys.shape[1], 50)
        held.write(torch.ones(*shape, held.keys.shape[3]), torch.ones(*shape, held.values.shape[3]), COLUMNS)
    extend(draft, full, PADS, [column + 50 for column in COLUMNS], queries_of(full), 50)
    assert [region.covered for region in draft.layers[0].regions] == [268 + 50, 248 + 50, 33]


def test_a_site_has_its_layers_budget(full: FullKV) -> None:
    layers = len(full.sites)
    draft = make(PyramidKV(keep=0.2), full)
    shares = [pyramid_share(0.2, 20, layer, layers) for layer in range(layers)]
    slots = [held.regions[0].slots for held in draft.layers]
    assert slots == [-int(-share * 268 // 1) for share in shares]
    assert slots == sorted(slots, reverse=True)


def test_a_site_has_the_method_that_was_written_for_it(full: FullKV) -> None:
    draft = make(parse("0: none, rest: streaming(keep=0.1) | kivi", {}), full)
    assert [region.slots for region in draft.layers[0].regions] == [300, 280, 15]
    assert not draft.layers[0].packed
    for held in draft.layers[1:]:
        assert held.packed
        assert [region.slots for region in held.regions] == [30, 28, 5]


def test_scores_are_on_the_models_own_scale(make_sites: Sites, fill: Fill) -> None:
    """SnapKV over a model that scales its products by another number than D^-0.5: as it chooses by that attention."""
    scale, chosen = 1.5, []
    for site_scale, factor in ((scale, 1.0), (0.25, 4 * scale)):  # 0.25 = 16^-0.5
        sites = [replace(site, scale=site_scale) for site in make_sites(1)]
        full = FullKV(sites, 1)
        fill(full, 0, 300)
        queries = [[None if q is None else q * factor for q in row[:1]] for row in queries_of(full)]
        chosen.append(compress(SnapKV(keep=0.2), full, [0], [300], queries, 50).layers[0].regions[0].materialize()[0])
    assert torch.equal(*chosen)
