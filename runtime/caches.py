"""Owns KV memory: the full cache of a sequence, and its draft cache (compressed regions and exact tails).

Shapes: B batch, K KV heads, C columns allocated, D head size, E value head size, T tokens, N slots of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Site
from vericache_compile.runtime.attention import Visible
from vericache_compile.runtime.sliding import OutOfWindow

GROWTH = 1024
"""Columns added when a full cache is out of room."""
EXACT = 32
"""Newest tokens that stay in the exact tail when older ones are compressed in."""
CHUNK = 128
"""Tokens that gather in the tail before they are compressed in."""


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)


def _write(target: Tensor, source: Tensor, columns: Sequence[int]) -> None:
    """Write source [B, K, T, *] to target [B, K, C, *], row b from column columns[b] on."""
    width = source.shape[2]
    if len(set(columns)) == 1:
        target[:, :, columns[0] : columns[0] + width] = source
        return
    for b, column in enumerate(columns):
        target[b, :, column : column + width] = source[b]


class FullKV:
    """Every key and value of a sequence, written by prefill and verify only."""

    def __init__(self, sites: Sequence[Site], batch: int) -> None:
        self.sites = tuple(sites)
        self.batch = batch
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.columns = 0
        """Columns allocated at every site: a multiple of BLOCK."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.untyped_storage().nbytes() for x in (*self.keys, *self.values))

    def reserve(self, columns: int, device: torch.device) -> None:
        """Make room for at least `columns` columns; what is held is kept."""
        if columns <= self.columns:
            return
        room = -(-(columns + (GROWTH if self.keys else BLOCK)) // BLOCK) * BLOCK
        for layer, site in enumerate(self.sites):
            like = torch.empty(0, dtype=site.dtype, device=device)
            for held, size in ((self.keys, site.head_size), (self.values, site.value_size)):
                grown = _zeros((self.batch, site.kv_heads, room, size), like)
                if self.columns:
                    grown[:, :, : self.columns] = held[layer]
                    held[layer] = grown
                else:
                    held.append(grown)
        self.columns = room

    def append(self, layer: int, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        """Write k [B, K, T, D] and v [B, K, T, E] from column columns[b] on."""
        _write(self.keys[layer], k, columns)
        _write(self.values[layer], v, columns)

    def select(self, rows: Sequence[int], columns: int) -> FullKV:
        """A copy of the first `columns` columns of the given rows (repeats allowed)."""
        copy = FullKV(self.sites, len(rows))
        device = self.keys[0].device
        copy.reserve(columns, device)
        index = torch.tensor(rows, device=device)
        for layer in range(len(self.sites)):
            copy.keys[layer][:, :, :columns] = self.keys[layer][:, :, :columns].index_select(0, index)
            copy.values[layer][:, :, :columns] = self.values[layer][:, :, :columns].index_select(0, index)
        return copy


@dataclass
class DraftLayer:
    """One site's draft cache: row b reads slots [slots - regions[b].slots, slots + its tail)."""

    regions: list[CompressedKV]
    slots: int
    """Slots before the tail: the largest region; smaller ones are aligned to its right end."""
    starts: list[int]
    """Column at which each row's tail starts."""
    keys: Tensor
    values: Tensor
    packed: bool
    """Whether regions are kept packed and materialised at each use; else they live in `keys` and `values`."""
    reach: int | None = None
    """Columns that a token attends to (a sliding layer: all of them in the tail, and no region); None for all."""

    @property
    def offset(self) -> int:
        """Slot of the first tail token in `keys` and `values`."""
        return 0 if self.packed else self.slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        own = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        return own + (sum(region.nbytes for region in self.regions) if self.packed else 0)

    def write(self, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        """Write k [B, K, T, D] and v [B, K, T, E] to the tail, row b from column columns[b] on."""
        at = [self.offset + column - start for column, start in zip(columns, self.starts, strict=True)]
        _write(self.keys, k, at)
        _write(self.values, v, at)

    def room(self, columns: Sequence[int]) -> int:
        """Columns that still fit in the fullest row's tail when rows are `columns` long."""
        tail = max(column - start for column, start in zip(columns, self.starts, strict=True))
        return self.keys.shape[2] - self.offset - tail

    def read(self, columns: Sequence[int]) -> tuple[Tensor, Tensor, Visible]:
        """Keys and values [B, K, S, *], and which slots rows `columns` long read of them."""
        tails = [column - start for column, start in zip(columns, self.starts, strict=True)]
        keys, values = self._materialize(max(tails)) if self.packed else (self.keys, self.values)
        lefts = self.lefts
        if self.reach is not None:
            lefts = tuple((max(tail - self.reach, 0),) * keys.shape[1] for tail in tails)
        return keys, values, Visible(lefts, tuple(self.slots + tail for tail in tails))

    def valid(self, columns: Sequence[int]) -> bool:
        """Whether rows may be `columns` long: no region covers a token beyond, and no tail starts inside a window."""
        if self.reach is None:
            return all(c >= start for c, start in zip(columns, self.starts, strict=True))
        firsts = (start - region.covered for start, region in zip(self.starts, self.regions, strict=True))
        sees = [max(c + 1 - self.reach, first) for c, first in zip(columns, firsts, strict=True)]
        return all(column >= start for column, start in zip(sees, self.starts, strict=True))

    @cached_property
    def lefts(self) -> tuple[tuple[int, ...], ...]:
        """The first slot that each KV head of each row reads."""
        heads = self.keys.shape[1]
        kept = [region.head_slots or (region.slots,) * heads for region in self.regions]
        return tuple(tuple(self.slots - count for count in row) for row in kept)

    def _materialize(self, longest: int) -> tuple[Tensor, Tensor]:
        parts = [region.materialize() for region in self.regions]
        out = []
        for held, side in ((self.keys, 0), (self.values, 1)):
            joined = held.new_zeros((held.shape[0], held.shape[1], self.slots + longest, held.shape[3]))
            for b, part in enumerate(parts):
                joined[b, :, self.slots - part[side].shape[1] : self.slots] = part[side]
            joined[:, :, self.slots :] = held[:, :, :longest]
            out.append(joined)
        return out[0], out[1]


class DraftKV:
    """What the draft variant attends to: per site and row an immutable compressed region and an exact tail."""

    def __init__(self, compressor: Compressor, layers: list[DraftLayer]) -> None:
        self.compressor = compressor
        self.layers = layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def valid(self, columns: Sequence[int]) -> bool:
        """Whether rows may be `columns` long at every site."""
        return all(layer.valid(columns) for layer in self.layers)

    @property
    def reaches(self) -> list[int | None]:
        """Per site the columns that a token attends to; None for all."""
        return [layer.reach for layer in self.layers]

    def room(self, columns: Sequence[int]) -> int:
        """Columns that every site's tail can still take."""
        return min(layer.room(columns) for layer in self.layers)


def compress(
    compressor: Compressor,
    full: FullKV,
    pads: Sequence[int],
    columns: Sequence[int],
    queries: Sequence[Sequence[Tensor | None]],
    room: int,
    before: DraftKV | None = None,
    reaches: Sequence[int | None] | None = None,
) -> DraftKV:
    """Compress each row's columns [pads[b], columns[b]) at every site; with `before`, only what tails have gathered.

    `queries[layer][b]` holds the row's last queries [H, w, D], or None where they were never seen (the cache was built
    by an uncompiled model). Tails get room for `room` columns more. A site that reaches a number of columns back
    (`reaches`, a sliding window) is not compressed: its tail has all that the next token sees.
    """
    layers = []
    for layer in range(len(full.sites)):
        regions, starts = [], []
        reach = reaches[layer] if reaches is not None else None
        if reach is not None:
            layers.append(_place_window(full, layer, pads, columns, room, reach))
            continue
        own = compressor.for_layer(layer, len(full.sites))
        for b, (pad, column) in enumerate(zip(pads, columns, strict=True)):
            held = before.layers[layer] if before is not None else None
            begin = held.starts[b] if held is not None else pad
            end = column if held is None else max(begin, column - EXACT)
            k, v = (x[b, :, begin:end] for x in (full.keys[layer], full.values[layer]))
            asked = queries[layer][b]
            if asked is None and compressor.queries:
                asked = _stand_in(k, full.sites[layer], compressor.queries)
            if held is None:
                region = own.compress(k, v, asked)
            else:
                region = held.regions[b].extend(k, v, asked) if end > begin else held.regions[b]
            regions.append(region)
            starts.append(pad + region.covered)
        layers.append(_place(regions, starts, full, layer, columns, room))
    return DraftKV(compressor, layers)


def _place_window(
    full: FullKV, layer: int, pads: Sequence[int], columns: Sequence[int], room: int, reach: int
) -> DraftLayer:
    """The draft cache of a sliding layer: nothing before the window, and the window itself exact in the tail."""
    starts = [max(pad, column + 1 - reach) for pad, column in zip(pads, columns, strict=True)]
    k, v = full.keys[layer][0], full.values[layer][0]
    regions: list[CompressedKV] = [OutOfWindow.like(k, v, start - pad) for start, pad in zip(starts, pads, strict=True)]
    made = _place(regions, starts, full, layer, columns, room)
    made.reach = reach
    return made


def _stand_in(keys: Tensor, site: Site, count: int) -> Tensor:
    """The last `count` of keys [K, S, D] in place of queries [H, count, D]: what a key is like, its query looks for."""
    return keys[:, -count:].repeat_interleave(site.heads // site.kv_heads, dim=0)


def _place(
    regions: list[CompressedKV], starts: list[int], full: FullKV, layer: int, columns: Sequence[int], room: int
) -> DraftLayer:
    """Allocate a site's draft cache, move unpacked regions into it, and fill the tails from the full cache."""
    slots = max(region.slots for region in regions)
    packed = any(not isinstance(region, DenseKV) for region in regions)
    longest = max(column - start for column, start in zip(columns, starts, strict=True))
    width = (0 if packed else slots) + longest + room
    like_k, like_v = full.keys[layer], full.values[layer]
    keys = _zeros((*like_k.shape[:2], width, like_k.shape[3]), like_k)
    values = _zeros((*like_v.shape[:2], width, like_v.shape[3]), like_v)
    made = DraftLayer(regions, slots, starts, keys, values, packed)
    for b, region in enumerate(regions):
        if not packed and isinstance(region, DenseKV):
            own = slice(slots - region.slots, slots)
            region.move_to(keys[b, :, own], values[b, :, own])
        tail = slice(made.offset, made.offset + columns[b] - starts[b])
        keys[b, :, tail] = like_k[b, :, starts[b] : columns[b]]
        values[b, :, tail] = like_v[b, :, starts[b] : columns[b]]
    return made
