"""The ring of device slots that sites' full KV comes to, and a round's view of it.

A slot holds one site's full KV of all rows. Transfers are begun in the order in which they are asked for, each as soon
as a slot is free; `release` frees one. So every ring from one slot up gives the same rows, only later.

Shapes: B batch, K KV heads, C columns, D head size, E value head size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Staging
from vericache_compile.runtime.caches import DraftKV, FullKV, Reaches, write_columns
from vericache_compile.runtime.counts import Span, Traffic
from vericache_compile.runtime.pages import FilePage, sides
from vericache_compile.runtime.tiers import PagedKV
from vericache_compile.runtime.transfers import Transfer


class Incoming:
    """A round's full KV on its way to attention. This one is for a cache that is on the device for good."""

    def __init__(self, full: FullKV, columns: Sequence[int]) -> None:
        self.full = full
        self.columns = tuple(columns)
        self.traffic = Traffic()
        self.spans: list[Span] = []

    def prefetch(self, layer: int) -> None:
        """Ask for a site's full KV."""

    def wait(self, layer: int) -> tuple[Tensor, Tensor]:
        """A site's full keys [B, K, C, D] and values [B, K, C, E], once they are there."""
        return self.full.keys[layer], self.full.values[layer]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the window's k [B, K, W, D] and v [B, K, W, E] behind what is verified, here and where it lives."""
        self.full.append(layer, k, v, self.columns)

    def release(self, layer: int) -> None:
        """A site's full KV has been attended to."""

    def close(self) -> None:
        """The round is over, or was given up: nothing is under way when this returns."""


class Ring:
    """Device slots for the sites of one model, of the same size each; kept between rounds."""

    def __init__(self) -> None:
        self.slots: list[Tensor] = []
        self._shape: tuple[int, int, torch.device] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(slot.nbytes for slot in self.slots)

    def fit(self, full: PagedKV, nbytes: int) -> None:
        """Make slots for this cache out of `nbytes`, in place of those for another shape."""
        staging = Staging(nbytes, full.columns)
        shape = (staging.slot_bytes(full.sites, full.batch), staging.slots(full.sites, full.batch), full.device)
        if self._shape != shape:
            self.slots.clear()
            size, count, device = self._shape = shape
            with torch.inference_mode(False):
                self.slots += [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(count)]


class PagedIncoming(Incoming):
    """Full KV that comes from a tier outside the device, through the ring.

    Only what the draft cache, if there is one, does not hold exactly is brought: the columns before each row's tail, of
    a sliding layer those that its window has there; the tail is copied from there. What lies in a slot beyond a row's
    window is zero up to the end of its block.
    """

    def __init__(
        self,
        full: PagedKV,
        draft: DraftKV | None,
        ring: Ring,
        columns: Sequence[int],
        pads: Sequence[int],
        reaches: Reaches = (),
    ) -> None:
        super().__init__(full, columns)
        self.paged, self.draft, self.reaches = full, draft, reaches
        self._pads = tuple(pads)
        self._free = deque(ring.slots)
        self._wanted: deque[int] = deque()
        self._asked: set[int] = set()
        self._under_way: dict[int, tuple[Tensor, Transfer]] = {}
        self._there: dict[int, tuple[Tensor, Tensor]] = {}

    def prefetch(self, layer: int) -> None:
        """Ask for a site's full KV; asking twice is asking once."""
        if layer not in self._asked:
            self._asked.add(layer)
            self._wanted.append(layer)
            self._begin()

    def wait(self, layer: int) -> tuple[Tensor, Tensor]:
        """A site's full keys [B, K, C, D] and values [B, K, C, E], once they are there; raises what went wrong."""
        if layer not in self._there:
            self.prefetch(layer)
            assert layer in self._under_way, f"site {layer} waits for a slot that nobody will release"
            slot, transfer = self._under_way[layer]
            began = time.perf_counter()
            transfer.result()
            self.traffic.waited += time.perf_counter() - began
            self._count(layer, transfer)
            self._there[layer] = self._views(layer, slot)
            self._fill_tail(layer, *self._there[layer])
        return self._there[layer]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the window's k [B, K, W, D] and v [B, K, W, E] to the slot and to the tier."""
        keys, values = self.wait(layer)
        write_columns(keys, k, self.columns)
        write_columns(values, v, self.columns)
        for b, column in enumerate(self.columns):
            end = column + k.shape[2]
            beyond = slice(end, -(-end // BLOCK) * BLOCK)
            keys[b, :, beyond] = 0
            values[b, :, beyond] = 0
        super().append(layer, k, v)

    def release(self, layer: int) -> None:
        """A site's full KV has been attended to: its slot is free for the next."""
        del self._there[layer]
        slot, _ = self._under_way.pop(layer)
        self._free.append(slot)
        self._begin()

    def close(self) -> None:
        """Let what is under way come to its end."""
        self._wanted.clear()
        for _, transfer in self._under_way.values():
            transfer.drain()

    def _begin(self) -> None:
        while self._wanted and self._free:
            layer, slot = self._wanted.popleft(), self._free.popleft()
            rows = (self._row(layer, b, *self._views(layer, slot)) for b in range(self.paged.batch))
            files = any(isinstance(page, FilePage) for row in self.paged.pages[layer] for page in row[:1])
            transfer = self.paged.link.submit(chain.from_iterable(rows), reads_files=files)
            self._under_way[layer] = (slot, transfer)

    def _row(self, layer: int, b: int, keys: Tensor, values: Tensor) -> Iterator[int]:
        reach = self.reaches[layer] if self.reaches else None
        oldest = self._pads[b] if reach is None else max(self._pads[b], self.columns[b] + 1 - reach)
        first = oldest // BLOCK * BLOCK
        return self.paged.copy_to(layer, b, slice(first, self._tail(layer, b)), keys[b], values[b])

    def _tail(self, layer: int, b: int) -> int:
        """The first column that the draft cache holds exactly."""
        return self.columns[b] if self.draft is None else self.draft.layers[layer].starts[b]

    def _views(self, layer: int, slot: Tensor) -> tuple[Tensor, Tensor]:
        site, full = self.paged.sites[layer], self.paged
        return sides(slot, site, full.batch, site.kv_heads, full.columns)

    def _fill_tail(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if self.draft is None:
            return
        held = self.draft.layers[layer]
        for b, column in enumerate(self.columns):
            own = slice(held.starts[b], column)
            tail = slice(held.offset, held.offset + column - held.starts[b])
            keys[b, :, own] = held.keys[b, :, tail]
            values[b, :, own] = held.values[b, :, tail]

    def _count(self, layer: int, transfer: Transfer) -> None:
        self.traffic.nbytes += transfer.nbytes
        self.traffic.seconds += transfer.seconds
        self.spans.append(Span(layer, transfer.began, transfer.seconds, transfer.nbytes))


def incoming(
    full: FullKV,
    draft: DraftKV | None,
    ring: Ring,
    staging_bytes: int,
    columns: Sequence[int],
    pads: Sequence[int],
    reaches: Reaches = (),
) -> Incoming:
    """A round's full KV, wherever it lives; rows start at `columns`, `reaches` is that of `compress`."""
    if not isinstance(full, PagedKV):
        return Incoming(full, columns)
    ring.fit(full, staging_bytes)
    return PagedIncoming(full, draft, ring, columns, pads, reaches)
