"""The ring of device slots that sites' full KV comes to, and a round's view of it.

A slot holds one site's full KV of all rows. Transfers are begun in the order in which they are asked for, each as soon
as a slot is free; `release` frees one. So every ring from one slot up gives the same rows, only later.

Shapes: B batch, K KV heads, C columns, D head size, E value head size.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Staging
from vericache_compile.runtime.caches import DraftKV, FullKV, Reaches, write_columns
from vericache_compile.runtime.clock import Moment, moment, seconds_between
from vericache_compile.runtime.counts import Span, Traffic
from vericache_compile.runtime.pages import sides
from vericache_compile.runtime.tiers import PagedKV
from vericache_compile.runtime.transfers import Transfer

log = logging.getLogger(__name__)


class Incoming:
    """A round's full KV on its way to attention. This one is for a cache that is on the device for good."""

    def __init__(self, full: FullKV, columns: Sequence[int]) -> None:
        self.full = full
        self.columns = tuple(columns)

    def traffic(self) -> tuple[Traffic, tuple[Span, ...]]:
        """What has come so far, as a whole and site by site; on a GPU only once the host has waited for the round."""
        return Traffic(), ()

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
        self._told = False

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(slot.nbytes for slot in self.slots)

    def fit(self, full: PagedKV, nbytes: int) -> None:
        """Make slots for this cache out of `nbytes`, in place of those for another shape.

        Fewer where the device has no memory for so many: half of them, and so on. Raises torch.OutOfMemoryError where
        there is none for one.
        """
        staging = Staging(nbytes, full.columns)
        shape = (staging.slot_bytes(full.sites, full.batch), staging.slots(full.sites, full.batch), full.device)
        if self._shape != shape:
            self._shape = None
            self.slots.clear()
            self.slots += self._allocate(*shape)
            self._shape = shape  # the one that was asked for: what there is no memory for is not tried in each round

    def _allocate(self, size: int, count: int, device: torch.device) -> list[Tensor]:
        made, fewer = _slots(size, count, device), count
        while made is None:
            fewer //= 2
            made = _slots(size, fewer, device)
        if fewer < count and not self._told:
            self._told = True
            log.warning(
                "vericache: no device memory for %d slots for full KV, there are %d: transfers begin later\n"
                "  where: %s, %d bytes a slot\n  fix: free device memory, or give staging_mb; rows are the same",
                count,
                fewer,
                device,
                size,
            )
        return made


def _slots(size: int, count: int, device: torch.device) -> list[Tensor] | None:
    """So many slots, or None where there is no memory for them; for a single one that raises."""
    try:
        with torch.inference_mode(False):
            return [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(count)]
    except torch.OutOfMemoryError:
        if count == 1:
            raise
        return None


class PagedIncoming(Incoming):
    """Full KV that comes from a tier outside the device, through the ring.

    What the draft cache, if there is one, holds as it was cached is copied from there: each row's tail, the newest
    tokens of its region that were kept as they are, and where the others were set apart (`remainder.py`) all that it
    kept. Of a sliding layer only what its window sees is brought. What lies in a slot beyond a row's window is zero up
    to the end of its block.
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
        self._came: list[tuple[int, Transfer, Moment, Moment]] = []
        """Per site that was waited for: its transfer, and when the wait began and ended."""

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
            began = moment(self.paged.device)
            transfer.result()
            self._came.append((layer, transfer, began, moment(self.paged.device)))
            self._there[layer] = self._views(layer, slot)
            self._fill_exact(layer, *self._there[layer])
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

    def traffic(self) -> tuple[Traffic, tuple[Span, ...]]:
        """What has come so far, as a whole and site by site; on a GPU only once the host has waited for the round."""
        spans = tuple(Span(layer, each.began, each.seconds, each.nbytes) for layer, each, *_ in self._came)
        waited = sum(seconds_between(began, ended) for *_, began, ended in self._came)
        return Traffic(sum(span.nbytes for span in spans), sum(span.seconds for span in spans), waited), spans

    def close(self) -> None:
        """Let what is under way come to its end."""
        self._wanted.clear()
        for _, transfer in self._under_way.values():
            transfer.drain()

    def _begin(self) -> None:
        while self._wanted and self._free:
            layer, slot = self._wanted.popleft(), self._free.popleft()
            rows = (self._row(layer, b, *self._views(layer, slot)) for b in range(self.paged.batch))
            transfer = self.paged.link.submit(chain.from_iterable(rows))
            self._under_way[layer] = (slot, transfer)

    def _row(self, layer: int, b: int, keys: Tensor, values: Tensor) -> Iterator[int]:
        reach = self.reaches[layer] if self.reaches else None
        oldest = self._pads[b] if reach is None else max(self._pads[b], self.columns[b] + 1 - reach)
        first, end = oldest // BLOCK * BLOCK, self._end(layer, b)
        apart = self.draft.layers[layer].remainders[b] if self.draft is not None else None
        if apart is not None:
            yield from self.paged.copy_to(layer, b, slice(first, apart.begin), keys[b], values[b])
            yield from apart.copy_to(self.paged.link, keys[b], values[b])
            first = apart.end
        yield from self.paged.copy_to(layer, b, slice(first, end), keys[b], values[b])

    def _end(self, layer: int, b: int) -> int:
        """The first column that the draft cache holds exactly, and all after it."""
        return self.columns[b] if self.draft is None else self.draft.layers[layer].exact_from[b]

    def _views(self, layer: int, slot: Tensor) -> tuple[Tensor, Tensor]:
        site, full = self.paged.sites[layer], self.paged
        return sides(slot, site, full.batch, site.kv_heads, full.columns)

    def _fill_exact(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if self.draft is None:
            return
        held = self.draft.layers[layer]
        for b, column in enumerate(self.columns):
            if (apart := held.remainders[b]) is not None:
                apart.put_in_order((keys[b], values[b]), held.regions[b])
            own = slice(held.exact_from[b], column)
            slots = slice(held.offset + own.start - held.starts[b], held.offset + own.stop - held.starts[b])
            keys[b, :, own] = held.keys[b, :, slots]
            values[b, :, own] = held.values[b, :, slots]


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
    full.link.catch_up()  # before slots go: a round that was given up may still have copies under way to them
    ring.fit(full, staging_bytes)
    return PagedIncoming(full, draft, ring, columns, pads, reaches)
