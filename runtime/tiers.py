"""Full KV that lives outside device memory, in pages: `PagedKV` has the interface of `FullKV` and gives the same bits.

Pages are allocated as they are written, never moved, and shared with forks until one of the two writes. On the disk
tier a page moves to a file once all its columns are verified; what is being written stays in host memory.

Shapes: B batch, K KV heads, P columns of a page, T tokens, D head size, E value head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Arrangement, Site, Tier, Way
from vericache_compile.runtime.caches import GROWTH, FullKV, room_for
from vericache_compile.runtime.pages import (
    FilePage,
    HostPage,
    PageFile,
    check_folder,
    host_memory,
    host_pages,
    join,
    sides,
)
from vericache_compile.runtime.transfers import Link

log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20
"""A page on a machine with an accelerator holds about this much of one head."""
Page = HostPage | FilePage


class Taken(NamedTuple):
    """Bytes of device memory that sequences take."""

    held: float = 0
    """By KV of all but the one that is asked for."""
    promised: float = 0
    """What draft caches of these will take."""
    ring: float = 0
    """By rings, which all sequences share."""
    own: float = 0
    """By KV of the one that is asked for: free for it, too."""


@dataclass(frozen=True)
class Home:
    """The place that new sequences' full KV goes to."""

    tier: Tier | None = Tier.DEVICE
    """None: as `weigh` says."""
    device_bytes: int | None = None
    """Room for KV on the device; None for what is free there (on the CPU: as much as is wanted)."""
    folder: str | None = None
    """Of the disk tier: where its file is made; None for the system's folder for temporary files."""
    link: Link | None = None
    """What brings pages to the device; None on the device tier."""
    weigh: Callable[[int, int, float, float], Arrangement] | None = None
    """(rows, columns, bytes of room, bytes of the ring beside it) -> how so much is decoded; where no tier is given."""

    @property
    def key(self) -> tuple[Tier | None, int | None]:
        """What decides where full KV lives."""
        return self.tier, self.device_bytes

    def weighs(self, device: torch.device) -> bool:
        """Whether there is something to weigh: no tier is given, and room on the device is bounded."""
        return self.tier is None and self._room(device, Taken()) is not None

    def arrange(self, batch: int, columns: int, device: torch.device, taken: Taken) -> Arrangement:
        """How a sequence of so many columns, that may grow by GROWTH, is decoded beside what is taken."""
        if self.tier is not None:
            return Arrangement(Way.RESIDENT if self.tier is Tier.DEVICE else Way.SWAPPED, by=self.key)
        room = self._room(device, taken)
        if room is None or self.weigh is None:
            return Arrangement(Way.RESIDENT, by=self.key)
        return replace(self.weigh(batch, columns + GROWTH, room, taken.ring), by=self.key)

    def make(self, sites: Sequence[Site], batch: int, way: Way) -> FullKV:
        """An empty cache."""
        if way is not Way.SWAPPED:
            return FullKV(sites, batch)
        assert self.link is not None, "a tier outside the device needs a link"
        return PagedKV(sites, batch, self.tier or Tier.HOST, self.folder, self.link)

    def moved(self, full: FullKV, columns: int, device: torch.device) -> FullKV:
        """The first `columns` columns of a cache on the device, in host memory; said once."""
        _tell_moved(str(device))
        made = self.make(full.sites, full.batch, Way.SWAPPED)
        if columns:
            made.reserve(columns, device)
            for layer in range(len(full.sites)):
                made.append(layer, *full.read(layer, 0, columns), [0] * full.batch)
        return made

    def _room(self, device: torch.device, taken: Taken) -> float | None:
        """Bytes of device memory that are left for KV; torch's own cache of freed blocks counts as free."""
        if self.device_bytes is not None:
            return self.device_bytes - taken.held - taken.promised - taken.ring
        free = self._free(device)
        return None if free is None else free - taken.promised + taken.own

    @staticmethod
    def _free(device: torch.device) -> int | None:
        if device.type != "cuda":
            return None
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached


@cache
def _tell_moved(device: str) -> None:
    log.warning(
        "vericache: full KV goes on in host memory: the device has no room for it any more\n  where: %s\n"
        "  fix: free device memory, give device_memory_mb, or begin with placement='host'",
        device,
    )


class PagedKV(FullKV):
    """Every key and value of a sequence, in pages outside device memory."""

    def __init__(self, sites: Sequence[Site], batch: int, tier: Tier, folder: str | None, link: Link) -> None:
        super().__init__(sites, batch)
        self.tier, self.folder, self.link = tier, folder, link
        self.device = torch.device("cpu")
        self.page = 0
        """Columns of a page: a multiple of BLOCK; 0 until the first columns are reserved."""
        self.pages: list[list[list[Page]]] = [[[] for _ in range(batch)] for _ in sites]
        self._files: dict[int, PageFile] = {}
        """By bytes of a page; sites of one shape share a file."""
        self._full_disk = False

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' pages; those that rows share count for each."""
        return sum(self._page_bytes(layer) * sum(map(len, rows)) for layer, rows in enumerate(self.pages))

    def parts(self) -> dict[int, int]:
        """Bytes of pages, in host memory and in files; none of them on the device."""
        sizes = map(self._page_bytes, range(len(self.sites)))
        return {id(page): size for size, rows in zip(sizes, self.pages, strict=True) for row in rows for page in row}

    def _page_bytes(self, layer: int) -> int:
        return self.page * self.sites[layer].bytes_per_token

    def reserve(self, columns: int, device: torch.device) -> None:
        """Say how many columns may be written; pages come as they are written to."""
        self.device = device
        self.link.pinned(device)  # from here on it has its stream, for the first append too
        if not self.page:
            self.page = _page_columns(columns, self.sites, device)
            if self.tier is Tier.DISK:
                check_folder(self.folder)
        if columns > self.columns:
            self.columns = room_for(columns)

    def give_back(self, columns: int) -> None:
        """Hold no more pages than `columns` columns take."""
        if (room := room_for(columns)) < self.columns:
            self.columns = room
            self.link.synchronize()  # copies to what goes may be under way
            for held in chain.from_iterable(self.pages):
                del held[-(-room // self.page) :]

    def append(self, layer: int, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        """Write k [B, K, T, D] and v [B, K, T, E] from column columns[b] on."""
        self.link.stored += sum(x.nbytes for x in (k, v)[: self.sites[layer].sides])
        with self.link.outgoing(k, v):
            for b, column in enumerate(columns):
                pages = partial(self._writable, layer, b)
                for own, keys, values in self._runs(pages, column, column + k.shape[2]):
                    source = slice(own.start - column, own.stop - column)
                    for held, given in self._sides(layer, (keys, k[b]), (values, v[b])):
                        self.link.store(held, given[:, source])

    def settle(self, layer: int, lengths: Sequence[int]) -> None:
        """Rows are verified up to `lengths`: on the disk tier whole pages below go to a file."""
        if self.tier is not Tier.DISK or self._full_disk:
            return
        for b, length in enumerate(lengths):
            for index, page in enumerate(self.pages[layer][b][: length // self.page]):
                if isinstance(page, HostPage) and not self._move_out(layer, b, index, page):
                    return

    def copy_to(
        self, layer: int, row: int, columns: slice, keys: Tensor, values: Tensor, origin: int = 0
    ) -> Iterator[int]:
        """Copy columns of a row to keys [K, C, D] and values [K, C, E], where column `origin` comes first.

        Of a latent site keys alone are copied: values are a part of them. One piece per step; yields its bytes. Raises
        PageLost for what a file does not give back.
        """
        pages = partial(self._readable, layer, row)
        for own, held_keys, held_values in self._runs(pages, columns.start, columns.stop):
            at = slice(own.start - origin, own.stop - origin)
            for given, held in self._sides(layer, (keys, held_keys), (values, held_values)):
                yield from self.link.copy(given[:, at], held)

    def read(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Columns [begin, end) of all rows, on the device: keys [B, K, end - begin, D] and values, once there."""
        site, rows = self.sites[layer], range(self.batch)
        size = self.batch * (end - begin) * site.bytes_per_token
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        keys, values = sides(buffer, site, self.batch, site.kv_heads, end - begin)
        jobs = (self.copy_to(layer, b, slice(begin, end), keys[b], values[b], begin) for b in rows)
        self.link.submit(chain.from_iterable(jobs)).result()
        return keys, values

    def gather(self, layer: int, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen columns [K, n] of a row, on the device: keys [K, n, D] and values [K, n, E]."""
        self.link.synchronize()
        site, wanted = self.sites[layer], columns.cpu()
        keys, values = (torch.empty(*wanted.shape, size, dtype=site.dtype) for size in _sizes(site))
        for index in sorted(set((wanted // self.page).flatten().tolist())):
            page = self._readable(layer, row, index)
            heads, places = (wanted // self.page == index).nonzero(as_tuple=True)
            own = wanted[heads, places] - index * self.page
            keys[heads, places], values[heads, places] = page.keys[heads, own], page.values[heads, own]
        self.recalled += keys.nbytes + values.nbytes
        return keys.to(self.device), values.to(self.device)

    def select(self, rows: Sequence[int], columns: int) -> PagedKV:
        """The first `columns` columns of the given rows (repeats allowed); whole pages are shared until written."""
        copy = PagedKV(self.sites, len(rows), self.tier, self.folder, self.link)
        copy.page, copy.columns, copy.device = self.page, self.columns, self.device
        copy._files, copy._full_disk = self._files, self._full_disk
        self.link.synchronize()
        whole = columns // self.page if self.page else 0
        for layer, held in enumerate(self.pages):
            for b, row in enumerate(rows):
                for page in held[row][:whole]:
                    if isinstance(page, HostPage):
                        page.shared = True
                copy.pages[layer][b] = held[row][:whole]
                if columns % (self.page or 1):  # one in a file is read when it is written to
                    last = held[row][whole]
                    copy.pages[layer][b].append(last if isinstance(last, FilePage) else self._copy(layer, last))
        return copy

    def _runs(self, pages: Callable[[int], HostPage], begin: int, end: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns [begin, end) and where they lie in `pages`, keys [K, n, D] and values: page by page, or for a link
        that copies by streams as much at once as lies side by side, since each copy costs its thread the same."""
        run: tuple[slice, Tensor, Tensor] | None = None
        for index, own, there in _cut(begin, end, self.page):
            if run is not None and not self.link.by_streams:
                yield run
                run = None
            page = pages(index)
            keys, values = page.keys[:, there], page.values[:, there]
            if run is not None:
                begun, *before = run
                whole = [join(*sides) for sides in zip(before, (keys, values), strict=True)]
                if whole[0] is not None and whole[1] is not None:
                    run = (slice(begun.start, own.stop), whole[0], whole[1])
                    continue
                yield run
            run = (own, keys, values)
        if run is not None:
            yield run

    def _sides(self, layer: int, *pairs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of a site's keys and values those that are held apart."""
        return pairs[: self.sites[layer].sides]

    def _writable(self, layer: int, row: int, index: int) -> HostPage:
        """A page in host memory that no other sequence reads; pages up to it are made."""
        if index >= len(self.pages[layer][row]):
            self._grow(layer, index + 1)
        page = self.pages[layer][row][index]
        if isinstance(page, FilePage) or page.shared:
            self.link.synchronize()
            self.pages[layer][row][index] = page = self._copy(layer, page)
        return page

    def _grow(self, layer: int, count: int) -> None:
        """Pages for all rows of a site at once: as many as were reserved, at least `count` each."""
        wanted = max(count, -(-self.columns // self.page)) if self.tier is Tier.HOST else count
        missing = [wanted - len(held) for held in self.pages[layer]]
        made = iter(host_pages(self.sites[layer], self.page, sum(missing), self.link.pinned(self.device)))
        for held, more in zip(self.pages[layer], missing, strict=True):
            held += [next(made) for _ in range(more)]

    def _copy(self, layer: int, page: Page) -> HostPage:
        source = page if isinstance(page, HostPage) else self._load(layer, page)
        [made] = host_pages(self.sites[layer], self.page, 1, self.link.pinned(self.device))
        for held, given in self._sides(layer, (made.keys, source.keys), (made.values, source.values)):
            held.copy_(given)
        return made

    def _readable(self, layer: int, row: int, index: int) -> HostPage:
        page = self.pages[layer][row][index]
        return page if isinstance(page, HostPage) else self._load(layer, page)

    def _load(self, layer: int, page: FilePage) -> HostPage:
        """A file's page in host memory of its own."""
        site = self.sites[layer]
        buffer = host_memory((self._page_bytes(layer),), torch.uint8, self.link.pinned(self.device))
        page.read(buffer)
        return HostPage(*sides(buffer, site, site.kv_heads, self.page))

    def _move_out(self, layer: int, row: int, index: int, page: HostPage) -> bool:
        """Move a page to the file; False, with one warning, where that cannot be: then pages stay in host memory."""
        size = self._page_bytes(layer)
        try:
            if size not in self._files:
                self._files[size] = PageFile(self.folder, size)
            self.link.synchronize()
            held = (page.keys, page.values)[: self.sites[layer].sides]
            flat = [x.reshape(-1).view(torch.uint8) for x in held]
            self.pages[layer][row][index] = self._files[size].write(torch.cat(flat))
        except OSError as error:
            self._full_disk = True
            log.warning(
                "vericache: KV pages stay in host memory: %s\n  where: %s\n  fix: make room there, or name another "
                "folder with kv_folder",
                error.strerror,
                self.folder or "the folder for temporary files",
            )
        return not self._full_disk


def _sizes(site: Site) -> tuple[int, int]:
    return site.head_size, site.value_size


def _page_columns(columns: int, sites: Sequence[Site], device: torch.device) -> int:
    """Columns of a page: BLOCK, or on an accelerator about CHUNK_BYTES of one head, though no more than are wanted."""
    if device.type == "cpu":
        return BLOCK
    widest = max(max(_sizes(site)) * site.dtype.itemsize for site in sites)
    wanted = min(CHUNK_BYTES // widest, columns)
    return max(wanted // BLOCK, 1) * BLOCK


def _cut(begin: int, end: int, page: int) -> Iterator[tuple[int, slice, slice]]:
    """Columns [begin, end) by pages: (page, its columns of the sequence, the same within the page)."""
    while begin < end:
        index, offset = divmod(begin, page)
        stop = min(end, (index + 1) * page)
        yield index, slice(begin, stop), slice(offset, offset + stop - begin)
        begin = stop
