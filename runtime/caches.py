"""Owns KV memory: the full cache of a sequence, and its draft cache (compressed regions and exact tails).

Shapes: B batch, K KV heads, C columns allocated, D head size, E value head size, T tokens, N slots of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.facts import reader_of
from vericache_compile.kernels import launch
from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.kernels.write_token import write_token
from vericache_compile.plan import Site, Tier
from vericache_compile.runtime.attention import Visible
from vericache_compile.runtime.remainder import Newest, Remainder

if TYPE_CHECKING:
    from vericache_compile.runtime.draft_step import DraftStep

GROWTH = 1024
"""The most columns that a full cache grows by at once."""
Remainders = list[Remainder | None]
"""What regions of one site leave out, per row; None where full KV comes whole."""
Tips = list[Newest | None]
"""The newest tokens that regions of one site hold as they were cached, per row."""

Reaches = Sequence[int | None]
"""Per site the columns that a token attends to, None for all; empty where it is all at every site."""


def room_for(columns: int) -> int:
    """Columns that a full cache for so many has, however it came to them: whole blocks, of long ones up to a sixteenth
    more.

    Growing copies what is held. While that is short, its copies are small beside the weights that a round reads; where
    it is long they come seldom: a cache is read and written per GROWTH tokens, and read whole by each round.
    """
    step = min(max(1 << max(columns.bit_length() - 5, 0), BLOCK), GROWTH)
    return -(-columns // step) * step


def whole_types(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, whose products would have another type than what they are made of: methods store and read
    numbers in that of the cache."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def zeros_for(shape: Sequence[int], like: Tensor, *, zeroed: bool = True) -> Tensor:
    """Zeros, or anything, of the type and device of `like`, that can be written in any mode."""
    make = torch.zeros if zeroed else torch.empty
    with torch.inference_mode(False):
        return make(tuple(shape), dtype=like.dtype, device=like.device)


def storages(*tensors: Tensor) -> dict[int, int]:
    """Bytes of the storages that tensors lie in, by their addresses."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the storages that tensors lie in, each counted once."""
    return sum(storages(*tensors).values())


def keys_and_values(site: Site, shape: Sequence[int], like: Tensor, *, zeroed: bool = True) -> tuple[Tensor, Tensor]:
    """Keys [*shape, D] and values [*shape, E] of a site: at a latent one these are a part of the keys."""
    sizes = (site.head_size, site.value_size)[: site.sides]
    made = [zeros_for((*shape, size), like, zeroed=zeroed) for size in sizes]
    return made[0], made[-1][..., : site.value_size]


def write_columns(target: Tensor, source: Tensor, columns: Sequence[int]) -> None:
    """Write source [B, K, T, *] to target [B, K, C, *], row b from column columns[b] on."""
    width = source.shape[2]
    if len(set(columns)) == 1:
        target[:, :, columns[0] : columns[0] + width] = source
        return
    for b, column in enumerate(columns):
        target[b, :, column : column + width] = source[b]


def apart(sites: Sequence[Remainders]) -> int:
    """Bytes in host memory of what regions of all sites leave out."""
    return sum(each.nbytes for site in sites for each in site if each is not None)


class FullKV:
    """Every key and value of a sequence, written by prefill and verify only. This one lies on the device for good."""

    tier: Tier = Tier.DEVICE
    """Where it lives."""
    recalled = 0
    """Bytes that `gather` brought to the device."""

    @property
    def resident(self) -> bool:
        """Whether it lies in device memory."""
        return self.tier is Tier.DEVICE

    def __init__(self, sites: Sequence[Site], batch: int) -> None:
        self.sites = tuple(sites)
        self.batch = batch
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.columns = 0
        """Columns allocated at every site: a multiple of BLOCK."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, wherever they lie."""
        return sum(self.parts().values())

    def parts(self) -> dict[int, int]:
        """Bytes of each part, by a number that is the same in all sequences that share the part."""
        return storages(*self.keys, *self.values)

    def reserve(self, columns: int, device: torch.device) -> None:
        """Make room for at least `columns` columns; what is held is kept."""
        if columns > self.columns:
            self._move(room_for(columns), device)

    def give_back(self, columns: int) -> None:
        """Hold no more room than `columns` columns take; what is held of these is kept."""
        if (room := room_for(columns)) < self.columns:
            self._move(room, self.keys[0].device)

    def _move(self, room: int, device: torch.device) -> None:
        """All that is held, as far as there is room, to new memory for so many columns, site by site."""
        kept = min(room, self.columns)
        for layer, site in enumerate(self.sites):
            like = torch.empty(0, dtype=site.dtype, device=device)
            made = keys_and_values(site, (self.batch, site.kv_heads, room), like, zeroed=False)
            for held, moved in zip((self.keys, self.values), made, strict=True):
                moved[:, :, kept:] = 0
                if self.columns:
                    moved[:, :, :kept] = held[layer][:, :, :kept]
                    held[layer] = moved
                else:
                    held.append(moved)
        self.columns = room

    def append(self, layer: int, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        """Write k [B, K, T, D] and v [B, K, T, E] from column columns[b] on."""
        write_columns(self.keys[layer], k, columns)
        write_columns(self.values[layer], v, columns)

    def settle(self, layer: int, lengths: Sequence[int]) -> None:
        """Rows are verified up to `lengths` at a site: whatever lies below may move to where it is kept."""

    def read(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Columns [begin, end) of all rows, on the device: keys [B, K, end - begin, D] and values; perhaps views."""
        return self.keys[layer][:, :, begin:end], self.values[layer][:, :, begin:end]

    def gather(self, layer: int, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen columns [K, n] of a row, on the device: keys [K, n, D] and values [K, n, E]."""
        return reader_of(self.keys[layer][row], self.values[layer][row])(columns)

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
    remainders: Remainders
    """What each row's region leaves out of full KV, where that lives in host memory."""
    tips: Tips
    """What each row's region holds of full KV at its end, where that lives outside the device."""
    capacity: int
    """Tokens that a tail gathers, at most; buffers may have room for more, for regions that grow in place."""
    reach: int | None = None
    """Columns that a token attends to (a sliding layer: all of them in the tail, and no region); None for all."""

    @property
    def offset(self) -> int:
        """Slot of the first tail token in `keys` and `values`."""
        return 0 if self.packed else self.slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        regions = sum(region.nbytes for region in self.regions) if self.packed else 0
        notes = sum(bytes_of(each.held, each.before, each.firsts) for each in self.remainders if each is not None)
        return bytes_of(self.keys, self.values) + regions + notes

    def write(self, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        """Write k [B, K, T, D] and v [B, K, T, E] to the tail, row b from column columns[b] on."""
        at = [self.offset + column - start for column, start in zip(columns, self.starts, strict=True)]
        write_columns(self.keys, k, at)
        write_columns(self.values, v, at)

    def write_at(self, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Write k [B, K, 1, D] and v [B, K, 1, E] to places[b] of row b's buffers; places [B] is on the device."""
        if launch.serves(k):
            write_token(self.keys, self.values, k, v, places)
            return
        at = places.view(-1, 1, 1, 1)
        self.keys.scatter_(2, at.expand_as(k), k)
        self.values.scatter_(2, at.expand_as(v), v)

    def room(self, columns: Sequence[int]) -> int:
        """Columns that still fit in the fullest row's tail when rows are `columns` long."""
        tail = max(column - start for column, start in zip(columns, self.starts, strict=True))
        return self.capacity - tail

    def read(self, columns: Sequence[int], q: Tensor | None = None) -> tuple[Tensor, Tensor, Visible]:
        """Keys and values [B, K, S, *], and which slots rows `columns` long read of them, for queries [B, H, 1, D]."""
        tails = [column - start for column, start in zip(columns, self.starts, strict=True)]
        keys, values = self._materialize(max(tails), q) if self.packed else (self.keys, self.values)
        return keys, values, self.visible(tails)

    @cached_property
    def attends(self) -> bool:
        """Whether every region attends itself."""
        return all(region.attends for region in self.regions)

    def attend(self, columns: Sequence[int], q: Tensor, scale: float) -> Tensor:
        """[B, H, 1, E] for queries [B, H, 1, D] of rows `columns` long, by regions that attend themselves."""
        outs: list[Tensor] = []
        with whole_types(q.device):
            for b, (region, column, start) in enumerate(zip(self.regions, columns, self.starts, strict=True)):
                own = slice(self.offset, self.offset + column - start)
                outs.append(region.attend(q[b, :, 0], (self.keys[b, :, own], self.values[b, :, own]), scale))
        return torch.stack(outs).unsqueeze(2).to(q.dtype)

    def visible(self, tails: Sequence[int]) -> Visible:
        """Which slots rows read whose tails hold so many tokens."""
        lefts = self.lefts
        if self.reach is not None:
            lefts = tuple((max(tail - self.reach, 0),) * self.keys.shape[1] for tail in tails)
        return Visible(lefts, tuple(self.slots + tail for tail in tails))

    def valid(self, columns: Sequence[int]) -> bool:
        """Whether rows may be `columns` long: no region covers a token beyond, and no tail starts inside a window."""
        if self.reach is None:
            return all(c >= start for c, start in zip(columns, self.starts, strict=True))
        firsts = (start - region.covered for start, region in zip(self.starts, self.regions, strict=True))
        sees = [max(c + 1 - self.reach, first) for c, first in zip(columns, firsts, strict=True)]
        return all(column >= start for column, start in zip(sees, self.starts, strict=True))

    def read_whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, S, *] with all of the tail's room: of the same shape however long rows are."""
        return self._materialize(self.keys.shape[2], None) if self.packed else (self.keys, self.values)

    @cached_property
    def exact_from(self) -> list[int]:
        """Column from which on each row lies here as it is in full KV: the end of its region, then its tail."""
        exact = [0 if self.packed or tip is None else tip.count for tip in self.tips]
        return [start - count for start, count in zip(self.starts, exact, strict=True)]

    @cached_property
    def lefts(self) -> tuple[tuple[int, ...], ...]:
        """The first slot that each KV head of each row reads."""
        heads = self.keys.shape[1]
        kept = [region.head_slots or (region.slots,) * heads for region in self.regions]
        return tuple(tuple(self.slots - count for count in row) for row in kept)

    def _materialize(self, longest: int, q: Tensor | None) -> tuple[Tensor, Tensor]:
        with whole_types(self.keys.device):
            parts = [
                region.materialize() if q is None else region.select(q[b, :, 0])
                for b, region in enumerate(self.regions)
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
    """What the draft variant attends to: per site and row a compressed region and an exact tail."""

    def __init__(
        self,
        compressor: Compressor,
        layers: list[DraftLayer],
        made: Sequence[int],
        pads: Sequence[int],
        whole: bool = False,
    ) -> None:
        self.compressor = compressor
        self.layers = layers
        self.made = list(made)
        """How long each row was when all of it was last compressed."""
        self.pads = list(pads)
        """Left padding of each row; no region holds any of it."""
        self.whole = whole
        """Whether some site keeps every token as it was cached, although the compressor does not."""
        self.step: DraftStep | None = None
        """One draft step over these buffers, where it runs with lengths on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def valid(self, columns: Sequence[int]) -> bool:
        """Whether rows may be `columns` long at every site."""
        return all(layer.valid(columns) for layer in self.layers)

    @property
    def apart(self) -> int:
        """Bytes in host memory of what regions leave out."""
        return apart([layer.remainders for layer in self.layers])

    @property
    def reaches(self) -> list[int | None]:
        """Per site the columns that a token attends to; None for all."""
        return [layer.reach for layer in self.layers]

    def age(self, columns: Sequence[int]) -> int:
        """The most tokens that a row, now `columns` long, has gained since all of it was compressed."""
        return max(column - then for column, then in zip(columns, self.made, strict=True))

    def room(self, columns: Sequence[int]) -> int:
        """Columns that every site's tail can still take."""
        return min(layer.room(columns) for layer in self.layers)
