"""Owns KV memory: the full cache of a sequence, and its draft cache (compressed regions and exact tails).

Shapes: B batch, K KV heads, C columns allocated, D head size, E value head size, T tokens, N slots of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.compressors.facts import KINDS, NOTHING, Facts
from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Site
from vericache_compile.runtime.attention import Visible

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

    def read(self, columns: Sequence[int], q: Tensor | None = None) -> tuple[Tensor, Tensor, Visible]:
        """Keys and values [B, K, S, *], and which slots rows `columns` long read of them, for queries [B, H, 1, D]."""
        tails = [column - start for column, start in zip(columns, self.starts, strict=True)]
        keys, values = self._materialize(max(tails), q) if self.packed else (self.keys, self.values)
        return keys, values, Visible(self.lefts, tuple(self.slots + tail for tail in tails))

    @cached_property
    def lefts(self) -> tuple[tuple[int, ...], ...]:
        """The first slot that each KV head of each row reads."""
        heads = self.keys.shape[1]
        kept = [region.head_slots or (region.slots,) * heads for region in self.regions]
        return tuple(tuple(self.slots - count for count in row) for row in kept)

    def _materialize(self, longest: int, q: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = [
            region.materialize() if q is None else region.select(q[b, :, 0]) for b, region in enumerate(self.regions)
        ]
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

    def __init__(self, compressor: Compressor, layers: list[DraftLayer], made: Sequence[int]) -> None:
        self.compressor = compressor
        self.layers = layers
        self.made = list(made)
        """How long each row was when all of it was last compressed."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def valid(self, columns: Sequence[int]) -> bool:
        """Whether rows may be `columns` long: no region covers a token beyond."""
        return all(c >= s for layer in self.layers for c, s in zip(columns, layer.starts, strict=True))

    def age(self, columns: Sequence[int]) -> int:
        """The most tokens that a row, now `columns` long, has gained since all of it was compressed."""
        return max(column - then for column, then in zip(columns, self.made, strict=True))

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
    facts_of: Callable[[int, int, int, int], Facts] | None = None,
) -> DraftKV:
    """Compress each row's columns [pads[b], columns[b]) at every site; with `before`, only what tails have gathered.

    `queries[layer][b]` holds the row's last queries [H, w, D], or None where they were never seen (the cache was built
    by an uncompiled model). Tails get room for `room` columns more. `facts_of(layer, b, begin, end)` is what the
    compressor is told of columns [begin, end), if it wants any of it.
    """
    layers = []
    if not compressor.wants & KINDS:
        facts_of = None
    for layer in range(len(full.sites)):
        regions, starts = [], []
        own = compressor.for_layer(layer, len(full.sites))
        for b, (pad, column) in enumerate(zip(pads, columns, strict=True)):
            held = before.layers[layer] if before is not None else None
            begin = held.starts[b] if held is not None else pad
            end = column if held is None else max(begin, column - EXACT)
            k, v = (x[b, :, begin:end] for x in (full.keys[layer], full.values[layer]))
            asked = queries[layer][b]
            if asked is None and compressor.queries:
                asked = _stand_in(k, full.sites[layer], compressor.queries)
            facts = facts_of(layer, b, begin, end) if facts_of is not None else NOTHING
            if held is None:
                region = own.knowing(facts).compress(k, v, asked)
            else:
                region = held.regions[b].knowing(facts).extend(k, v, asked) if end > begin else held.regions[b]
            regions.append(region.knowing(NOTHING))  # what it was told need not live as long as it does
            starts.append(pad + region.covered)
        layers.append(_place(regions, starts, full, layer, columns, room))
    return DraftKV(compressor, layers, columns if before is None else before.made)


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
