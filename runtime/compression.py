"""Draft caches made: each site's keys and values compressed, and what tails have gathered compressed in.

Shapes: B batch, K KV heads, D head size, E value head size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.borrowed import BorrowedKV
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.none import NoCompression
from vericache_compile.plan import Site
from vericache_compile.runtime.caches import DraftKV, DraftLayer, FullKV, Reaches, Remainders, Tips, keys_and_values
from vericache_compile.runtime.remainder import carry_over, check_newest, set_apart
from vericache_compile.runtime.sliding import OutOfWindow
from vericache_compile.runtime.tiers import PagedKV

log = logging.getLogger(__name__)
EXACT = 32
"""Newest tokens that stay in the exact tail when older ones are compressed in."""
CHUNK = 128
"""Tokens that gather in the tail before they are compressed in."""
SPARE = 16
"""On a GPU regions have room besides, for one slot in so many: those that grow in place are read by the same
recordings."""


@dataclass(frozen=True)
class Columns:
    """Exact keys and values of one site [B, K, *, D or E]; column c of row b is at c - origins[b]."""

    keys: Tensor
    values: Tensor
    origins: list[int]

    def row(self, b: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Columns [begin, end) of a row: keys [K, end - begin, D] and values."""
        own = slice(begin - self.origins[b], end - self.origins[b])
        return self.keys[b, :, own], self.values[b, :, own]


Regions = list[list[CompressedKV]]
"""A region per site and row."""


@dataclass
class Early:
    """Regions that prefill made while each site's keys and values were on the device anyway."""

    compressor: Compressor
    pads: list[int]
    apart: bool
    """Whether what regions leave out is set apart."""
    regions: Regions = field(default_factory=list)
    remainders: list[Remainders] = field(default_factory=list)
    """What they leave out, per site and row."""
    tips: list[Tips] = field(default_factory=list)
    """What they hold at their ends, per site and row."""


Tell = Callable[[int, int, int, int], Facts]
"""(layer, row, begin, end) -> what a compressor that wants it is told of columns [begin, end)."""


def compress_site(
    compressor: Compressor,
    exact: Columns,
    site: Site,
    spans: Sequence[tuple[int, int]],
    queries: Sequence[Tensor | None],
    earlier: Regions,
    tell: Tell | None = None,
) -> list[CompressedKV]:
    """One site's regions: row b's columns spans[b] compressed by the method of that site, or borrowed from `earlier`.

    `queries[b]` holds the row's last queries [H, w, D], or None where they were never seen (the cache was built by an
    uncompiled model).
    """
    if compressor.donor is not None:
        return [BorrowedKV(region) for region in earlier[compressor.donor]]
    regions = []
    for b, span in enumerate(spans):
        keys, values = exact.row(b, *span)
        asked = _asked(compressor, keys, site, queries[b])
        if tell is None:
            regions.append(compressor.compress(keys, values, asked))
        else:
            facts = tell(site.layer, b, *span)
            regions.append(compressor.knowing(facts).compress(keys, values, asked).knowing(facts.lasting))
    return regions


def compress(
    compressor: Compressor,
    full: FullKV,
    pads: Sequence[int],
    columns: Sequence[int],
    queries: Sequence[Sequence[Tensor | None]],
    room: int,
    early: Early | None = None,
    tell: Tell | None = None,
    placed: Collection[int] = (),
    reaches: Reaches = (),
    apart: bool = False,
) -> DraftKV:
    """Compress each row's columns [pads[b], columns[b]) at every site, or take the regions that were made `early`.

    `queries[layer][b]` are those of `compress_site`, and `tell` is. Tails get room for `room` columns more. Slots do
    not say where in the text a token stood: sites in `placed`, which need to know, keep every token where the method
    drops some or changes their order, and are given no `early` regions. A site that reaches a number of columns back
    (`reaches`, a sliding window) is not compressed: its tail has all that the next token sees. With `apart` what
    regions leave out is set apart in host memory.
    """
    layers: list[DraftLayer] = []
    whole = False
    for layer, site in enumerate(full.sites):
        if (reach := _reach(reaches, layer)) is not None:
            begin = min(_window_starts(pads, columns, reach))
            exact = Columns(*full.read(layer, begin, max(columns)), [begin] * full.batch)
            layers.append(_place_window(site, exact, pads, columns, room, reach))
            continue
        own = _method(compressor, layer, full.sites, reaches)
        ready, left, tips = None, None, None
        if (
            early is not None
            and layer not in placed
            and own.donor == compressor.for_layer(layer, len(full.sites)).donor
        ):
            ready, left, tips = early.regions[layer], early.remainders[layer], early.tips[layer]
        begin = 0 if ready is None else min(p + r.covered for p, r in zip(pads, ready, strict=True))
        exact = Columns(*full.read(layer, begin, max(columns)), [begin] * full.batch)
        if ready is not None:
            regions = ready
        else:
            spans, made = list(zip(pads, columns, strict=True)), [each.regions for each in layers]
            regions = compress_site(own, exact, site, spans, queries[layer], made, tell)
        if layer in placed and not _keeps_all(regions):
            regions, whole = _keep_all(exact, list(zip(pads, columns, strict=True))), True
        if left is None or tips is None:
            left = leave_out(full, site, exact, regions, pads, apart)
            tips = hold_newest(full, exact, regions, pads, pads)
        layers.append(_place(site, regions, pads, exact, columns, room, left, tips))
    _check(layers, compressor)
    return DraftKV(compressor, layers, columns, pads, whole)


def leave_out(
    full: FullKV, site: Site, exact: Columns, regions: Sequence[CompressedKV], begins: Sequence[int], apart: bool
) -> Remainders:
    """What each row's region leaves out of its columns from begins[b] on, set apart where that is wanted."""
    if not apart:
        return [None] * len(regions)
    assert isinstance(full, PagedKV), "full KV that lives in host memory is in pages"
    return [
        set_apart(site, *exact.row(b, begin, begin + region.covered), region, begin, full.link)
        for b, (region, begin) in enumerate(zip(regions, begins, strict=True))
    ]


def hold_newest(
    full: FullKV, exact: Columns, regions: Sequence[CompressedKV], pads: Sequence[int], begins: Sequence[int]
) -> Tips:
    """What each row's region holds at its end, where full KV comes from elsewhere; `exact` is known from column
    begins[b] on."""
    if full.resident:
        return [None] * len(regions)
    return [
        check_newest(*exact.row(b, begin, pad + region.covered), region)
        for b, (region, pad, begin) in enumerate(zip(regions, pads, begins, strict=True))
    ]


def _check(layers: Sequence[DraftLayer], compressor: Compressor) -> None:
    """Forget what was left out by regions that hold something else than tokens as they were cached, and what they say
    of their newest; the host waits."""
    claims = [each for layer in layers for each in (*layer.remainders, *layer.tips) if each is not None]
    sure = iter(torch.stack([each.sure for each in claims]).tolist() if claims else [])
    for layer in layers:
        layer.remainders = [each if each is not None and next(sure) else None for each in layer.remainders]
        said = [tip is not None for tip in layer.tips]
        layer.tips = [tip if tip is not None and next(sure) else None for tip in layer.tips]
        if said != [tip is not None for tip in layer.tips]:
            _tell_inexact(str(compressor))


@cache
def _tell_inexact(method: str) -> None:
    log.warning(
        "vericache: regions do not hold their newest tokens as they were cached, as they say: these come over the link "
        "too\n  where: compressor %s\n  fix: correct `exact` of its regions, or leave it out",
        method,
    )


def extend(
    draft: DraftKV,
    full: FullKV,
    pads: Sequence[int],
    columns: Sequence[int],
    queries: Sequence[Sequence[Tensor | None]],
    room: int,
    tell: Tell | None = None,
    placed: Collection[int] = (),
) -> None:
    """Compress in what tails have gathered, all but the newest tokens; arguments as those of `compress`.

    Site by site, in the same buffer where that has room. After an error the draft cache is of no use.
    """
    layers, compressor, reaches = draft.layers, draft.compressor, draft.reaches
    for layer, (held, site) in enumerate(zip(layers, full.sites, strict=True)):
        exact = Columns(held.keys, held.values, [start - held.offset for start in held.starts])
        if held.reach is not None:
            layers[layer] = _place_window(site, exact, pads, columns, room, held.reach, held)
            continue
        own = _method(compressor, layer, full.sites, reaches)
        newest = max(EXACT, own.least_tail)
        regions: list[CompressedKV] = []
        known: Sequence[int] = held.exact_from
        for b, (region, start, column) in enumerate(zip(held.regions, held.starts, columns, strict=True)):
            end = max(start, column - newest)
            k, v = exact.row(b, start, end)
            if own.donor is not None:
                region = BorrowedKV(layers[own.donor].regions[b])
            elif end > start:
                asked = _asked(compressor, k, site, queries[layer][b])
                if tell is None:
                    region = region.extend(k, v, asked)
                else:
                    facts = tell(layer, b, start, end)
                    region = region.knowing(facts).extend(k, v, asked).knowing(facts.lasting)
            regions.append(region)
        if layer in placed and not _keeps_all(regions):
            exact, draft.whole = Columns(*full.read(layer, 0, max(columns)), [0] * full.batch), True
            regions, known = _keep_all(exact, list(zip(pads, columns, strict=True))), pads
        left = list(map(carry_over, held.remainders, held.regions, regions))
        tips = hold_newest(full, exact, regions, pads, known)
        layers[layer] = _place(site, regions, pads, exact, columns, room, left, tips, held)
    _check(layers, compressor)


def leaves_room(device: torch.device) -> bool:
    """Whether regions have room to grow in: where steps over them are recorded."""
    return device.type == "cuda"


def _keeps_all(regions: Sequence[CompressedKV]) -> bool:
    """Whether every head of every region holds all tokens, and in the order of the text."""
    return all(region.in_order and min(region.head_slots or (region.slots,)) == region.covered for region in regions)


def _keep_all(exact: Columns, spans: Sequence[tuple[int, int]]) -> list[CompressedKV]:
    """Regions of every token of each row's columns spans[b]."""
    return [NoCompression().compress(*exact.row(b, *span), None) for b, span in enumerate(spans)]


def _asked(compressor: Compressor, keys: Tensor, site: Site, queries: Tensor | None) -> Tensor | None:
    """The queries that a method is shown, on the scale on which products with the keys, by sqrt(D), are the model's."""
    if queries is None:
        return _stand_in(keys, site, compressor.queries) if compressor.queries else None
    factor = site.scale * math.sqrt(site.head_size)
    return queries if math.isclose(factor, 1) else queries * factor


def _reach(reaches: Reaches, layer: int) -> int | None:
    return reaches[layer] if reaches else None


def _method(compressor: Compressor, layer: int, sites: Sequence[Site], reaches: Reaches) -> Compressor:
    """The method of a site; none where it would borrow from a site of another shape, or from a sliding layer, which
    holds its window alone."""
    own = compressor.for_layer(layer, len(sites))
    if own.donor is None:
        return own
    alike = sites[layer].shape == sites[own.donor].shape
    return own if alike and _reach(reaches, own.donor) is None else NoCompression()


def _window_starts(pads: Sequence[int], columns: Sequence[int], reach: int) -> list[int]:
    """The first column that the next token of each row attends to."""
    return [max(pad, column + 1 - reach) for pad, column in zip(pads, columns, strict=True)]


def _place_window(
    site: Site,
    exact: Columns,
    pads: Sequence[int],
    columns: Sequence[int],
    room: int,
    reach: int,
    before: DraftLayer | None = None,
) -> DraftLayer:
    """The draft cache of a sliding layer: nothing before the window, and the window itself exact in the tail."""
    starts = _window_starts(pads, columns, reach)
    k, v = exact.keys[0], exact.values[0]
    regions: list[CompressedKV] = [OutOfWindow.like(k, v, start - pad) for start, pad in zip(starts, pads, strict=True)]
    nothing = [None] * len(regions)
    made = _place(site, regions, pads, exact, columns, room, [*nothing], [*nothing], before)
    made.reach = reach
    return made


def _stand_in(keys: Tensor, site: Site, count: int) -> Tensor:
    """The last `count` of keys [K, S, D] in place of queries [H, count, D]: what a key is like, its query looks for."""
    return keys[:, -count:].repeat_interleave(site.heads // site.kv_heads, dim=0)


def _place(
    site: Site,
    regions: list[CompressedKV],
    pads: Sequence[int],
    exact: Columns,
    columns: Sequence[int],
    room: int,
    remainders: Remainders,
    tips: Tips,
    before: DraftLayer | None = None,
) -> DraftLayer:
    """A site's draft cache: unpacked regions moved into its buffer, and tails filled with what is exact.

    The buffer is that of the cache `before`, if two thirds of the room are left there, else a new one.
    """
    starts = [pad + region.covered for pad, region in zip(pads, regions, strict=True)]
    slots = max(region.slots for region in regions)
    spare = slots // SPARE if leaves_room(exact.keys.device) else None
    packed = any(not isinstance(region, DenseKV) for region in regions)
    longest = max(column - start for column, start in zip(columns, starts, strict=True))
    needed = (0 if packed else slots) + longest + room
    tails = [exact.row(b, start, column) for b, (start, column) in enumerate(zip(starts, columns, strict=True))]
    if before is not None and before.packed == packed and needed - room // 3 <= before.keys.shape[2]:
        keys, values = before.keys, before.values
        tails = [(k.clone(), v.clone()) for k, v in tails]  # they lie where the region goes
    else:
        shape = (*exact.keys.shape[:2], needed + (0 if packed or spare is None else EXACT + spare))
        keys, values = keys_and_values(site, shape, exact.keys)
    capacity = longest + room - max(needed - keys.shape[2], 0)
    made = DraftLayer(regions, slots, starts, keys, values, packed, remainders, tips, capacity)
    for b, (region, (k, v)) in enumerate(zip(regions, tails, strict=True)):
        if packed and spare is not None and region.packed is not None:
            region.leave_room(room + spare)  # for all that a tail gathers, once at least
        if not packed and isinstance(region, DenseKV):
            own = slice(slots - region.slots, slots)
            region.move_to(keys[b, :, own], values[b, :, own])
        tail = slice(made.offset, made.offset + columns[b] - starts[b])
        keys[b, :, tail], values[b, :, tail] = k, v
    return made
