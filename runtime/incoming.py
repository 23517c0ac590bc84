"""A round's full KV on its way to attention: through the ring where it lives outside the device.

Transfers are begun in the order of the sites, each as soon as the ring has room for it, and `release` makes room. So
every ring from one site's size up gives the same rows, only later.

Shapes: B batch, K KV heads, C columns, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor

from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Staging, rounded
from vericache_compile.runtime.caches import DraftKV, FullKV, Reaches, write_columns
from vericache_compile.runtime.clock import Moment, moment, seconds_between
from vericache_compile.runtime.counts import Span, Traffic
from vericache_compile.runtime.pages import sides
from vericache_compile.runtime.remainder import Remainder
from vericache_compile.runtime.ring import Ring, aligned
from vericache_compile.runtime.tiers import PagedKV
from vericache_compile.runtime.transfers import Transfer


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


class PagedIncoming(Incoming):
    """Full KV that comes from a tier outside the device, through the ring.

    What the draft cache, if there is one, holds as it was cached is copied from there: each row's tail, the newest
    tokens of its region that were kept as they are, and where the others were set apart (`remainder.py`) all that it
    kept. Of a sliding layer only what its window sees is brought. A site of which all else comes is read by attention
    where it comes to; of a sliding layer, and where something was set apart, the ring gets only what comes, and the
    site is put together elsewhere. What lies there beyond a row's window is zero up to the end of its block.
    """

    def __init__(
        self,
        full: PagedKV,
        draft: DraftKV | None,
        ring: Ring,
        nbytes: int,
        columns: Sequence[int],
        pads: Sequence[int],
        reaches: Reaches = (),
    ) -> None:
        super().__init__(full, columns)
        self.paged, self.draft, self.ring, self.reaches = full, draft, ring, reaches
        self._pads = tuple(pads)
        self._next = 0
        """The site whose transfer begins next."""
        self._under_way: dict[int, tuple[Tensor, Transfer]] = {}
        """By site: its part of the ring, and the transfer to it."""
        self._there: dict[int, tuple[Tensor, Tensor]] = {}
        self._came: list[tuple[int, Transfer, Moment, Moment]] = []
        """Per site that was waited for: its transfer, and when the wait began and ended."""
        layers = range(len(full.sites))
        whole = max((self._whole_bytes(layer) for layer in layers if self._is_partial(layer)), default=0)
        ring.fit(nbytes, [self._bytes(layer) for layer in layers], whole, full.device)

    def prefetch(self, layer: int) -> None:
        """Ask for a site's full KV; asking for one asks for those behind it too, as far as there is room."""
        for site in range(self._next, len(self.paged.sites)):
            held = self.ring.claim(self._bytes(site))
            if held is None:
                break
            rows = [self._row(site, b, held) for b in range(self.paged.batch)]
            self._under_way[site] = (held, self.paged.link.submit(chain.from_iterable(rows)))
            self._next = site + 1

    def wait(self, layer: int) -> tuple[Tensor, Tensor]:
        """A site's full keys [B, K, C, D] and values [B, K, C, E], once they are there; raises what went wrong."""
        if layer not in self._there:
            self.prefetch(layer)
            assert layer in self._under_way, f"site {layer} waits for room in the ring that nobody will make"
            held, transfer = self._under_way[layer]
            began = moment(self.paged.device)
            transfer.result()
            self._came.append((layer, transfer, began, moment(self.paged.device)))
            self._there[layer] = self._put_together(layer) if self._is_partial(layer) else self._views(layer, held)
            self._fill_exact(layer, *self._there[layer])
        return self._there[layer]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the window's k [B, K, W, D] and v [B, K, W, E] to what attention reads, and to the tier."""
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
        """A site's full KV has been attended to: what it took is free for the next."""
        del self._there[layer]
        if layer in self._under_way:
            self._make_room(layer)

    def traffic(self) -> tuple[Traffic, tuple[Span, ...]]:
        """What has come so far, as a whole and site by site; on a GPU only once the host has waited for the round."""
        spans = tuple(Span(layer, each.began, each.seconds, each.nbytes) for layer, each, *_ in self._came)
        waited = sum(seconds_between(began, ended) for *_, began, ended in self._came)
        return Traffic(sum(span.nbytes for span in spans), sum(span.seconds for span in spans), waited), spans

    def close(self) -> None:
        """Let what is under way come to its end; nothing more begins."""
        self._next = len(self.paged.sites)
        for _, transfer in self._under_way.values():
            transfer.drain()

    def _make_room(self, layer: int) -> None:
        held, _ = self._under_way.pop(layer)
        self.ring.release(held)
        self.prefetch(layer)

    def _apart(self, layer: int, b: int) -> Remainder | None:
        return None if self.draft is None else self.draft.layers[layer].remainders[b]

    def _is_partial(self, layer: int) -> bool:
        """Whether much of a site does not come: it slides, or something was set apart of one of its rows."""
        slides = bool(self.reaches) and self.reaches[layer] is not None
        return slides or any(self._apart(layer, b) is not None for b in range(self.paged.batch))

    def _columns(self, layer: int, b: int) -> tuple[int, int]:
        """The first column that comes, at the beginning of a block, and the first that the draft cache holds exactly,
        as it does all after it."""
        reach = self.reaches[layer] if self.reaches else None
        oldest = self._pads[b] if reach is None else max(self._pads[b], self.columns[b] + 1 - reach)
        end = self.columns[b] if self.draft is None else self.draft.layers[layer].exact_from[b]
        return oldest // BLOCK * BLOCK, end

    def _width(self, layer: int, b: int) -> int:
        """Columns that come of a row."""
        first, end = self._columns(layer, b)
        if (apart := self._apart(layer, b)) is None:
            return max(end - first, 0)
        return apart.begin - first + apart.most + max(end - apart.end, 0)

    def _bytes(self, layer: int) -> int:
        """Of the ring, for one site."""
        if not self._is_partial(layer):
            return self._whole_bytes(layer)
        size = self.paged.sites[layer].bytes_per_token
        return sum(aligned(size * self._width(layer, b)) for b in range(self.paged.batch))

    def _whole_bytes(self, layer: int) -> int:
        return self.paged.batch * self.paged.columns * self.paged.sites[layer].bytes_per_token

    def _views(self, layer: int, held: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, K, C, D] and values [B, K, C, E] in bytes of the device."""
        site, full = self.paged.sites[layer], self.paged
        return sides(held, site, full.batch, site.kv_heads, full.columns)

    def _part(self, layer: int, b: int, held: Tensor) -> tuple[Tensor, Tensor]:
        """Of a site's bytes of the ring a row's: keys [K, width, D] and values [K, width, E]."""
        site = self.paged.sites[layer]
        before = sum(aligned(site.bytes_per_token * self._width(layer, other)) for other in range(b))
        return sides(held[before:], site, site.kv_heads, self._width(layer, b))

    def _row(self, layer: int, b: int, held: Tensor) -> Iterator[int]:
        first, end = self._columns(layer, b)
        if not self._is_partial(layer):
            keys, values = self._views(layer, held)
            yield from self.paged.copy_to(layer, b, slice(first, end), keys[b], values[b])
            return
        keys, values = self._part(layer, b, held)
        if (apart := self._apart(layer, b)) is not None:
            before, behind = apart.begin - first, apart.begin - first + apart.most
            yield from self.paged.copy_to(layer, b, slice(first, apart.begin), keys, values, first)
            yield from apart.copy_to(self.paged.link, keys[:, before:behind], values[:, before:behind])
            keys, values, first = keys[:, behind:], values[:, behind:], apart.end
        yield from self.paged.copy_to(layer, b, slice(first, end), keys, values, first)

    def _put_together(self, layer: int) -> tuple[Tensor, Tensor]:
        """A site's full keys and values of what came of it and what draft holds; then its part of the ring is free."""
        assert self.ring.whole is not None, "the ring was not made for this"
        assert not self._there, "a site is put together where the one before is still read"
        held, _ = self._under_way[layer]
        whole, count = self._views(layer, self.ring.whole), self.paged.sites[layer].sides
        for b in range(self.paged.batch):
            first, end = self._columns(layer, b)
            to, came = ([side[b] for side in whole[:count]], self._part(layer, b, held)[:count])
            if (apart := self._apart(layer, b)) is not None:
                assert self.draft is not None, "set apart for a draft"
                before, behind = apart.begin - first, apart.begin - first + apart.most
                for target, part in zip(to, came, strict=True):
                    target[:, first : apart.begin] = part[:, :before]
                inner = [target[:, apart.begin : apart.end] for target in to]
                region = self.draft.layers[layer].regions[b]
                apart.put_in_order(inner, [part[:, before:behind] for part in came], region)
                came, first = tuple(part[:, behind:] for part in came), apart.end
            for target, part in zip(to, came, strict=True):
                target[:, first:end] = part
        self._make_room(layer)
        return whole

    def _fill_exact(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if self.draft is None:
            return
        held = self.draft.layers[layer]
        for b, column in enumerate(self.columns):
            own = slice(held.exact_from[b], column)
            slots = slice(held.offset + own.start - held.starts[b], held.offset + own.stop - held.starts[b])
            keys[b, :, own] = held.keys[b, :, slots]
            values[b, :, own] = held.values[b, :, slots]


def incoming(
    full: FullKV,
    draft: DraftKV | None,
    ring: Ring,
    staging: Staging | None,
    columns: Sequence[int],
    pads: Sequence[int],
    reaches: Reaches = (),
    while_drafting: int = 0,
) -> Incoming:
    """A round's full KV, wherever it lives; rows start at `columns`, `reaches` is that of `compress`.

    Where it lives outside the device `staging` says what the ring may take; unless that was given, it is no less than
    what was seen to come `while_drafting`, in bytes, in this round or in any before.
    """
    if not isinstance(full, PagedKV):
        return Incoming(full, columns)
    nbytes = 0  # a sequence begun under another placement: one site at a time
    if staging is not None:
        ring.seen = max(ring.seen, rounded(while_drafting))
        nbytes = staging.bytes_beside(0 if draft is None else draft.nbytes, ring.seen)
    full.link.catch_up()  # before memory goes: a round that was given up may still have copies under way to it
    return PagedIncoming(full, draft, ring, nbytes, columns, pads, reaches)
