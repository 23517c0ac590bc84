"""Full KV outside device memory: pages hold what was written, forks share them, files are checked, nothing stays."""

from __future__ import annotations

import errno
import gc
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.errors import PageLost, VericacheError
from vericache_compile.plan import Site, Tier, Way
from vericache_compile.runtime import pages
from vericache_compile.runtime.caches import FullKV
from vericache_compile.runtime.pages import FilePage, HostPage
from vericache_compile.runtime.tiers import Home, PagedKV
from vericache_compile.runtime.transfers import Link

Sites = Callable[..., list[Site]]
Fill = Callable[..., None]
CPU = torch.device("cpu")
TIERS = (Tier.HOST, Tier.DISK)


def make(sites: list[Site], batch: int, tier: Tier = Tier.HOST, folder: Path | None = None) -> PagedKV:
    made = Home(tier, None, None if folder is None else str(folder), Link()).make(sites, batch, Way.SWAPPED)
    assert isinstance(made, PagedKV)
    return made


def files_of(full: PagedKV) -> list[FilePage]:
    return [page for rows in full.pages for row in rows for page in row if isinstance(page, FilePage)]


def open_files(folder: Path) -> int:
    """Open files that were made in the folder."""
    links = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sum(str(path.readlink()).startswith(str(folder)) for path in links)


def contents(full: FullKV, begin: int, end: int) -> list[Tensor]:
    return [side.clone() for site in full.sites for side in full.read(site.layer, begin, end)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@dataclass
class Twins:
    """A sequence in pages and the same on the device, and how long each of its rows is."""

    ours: PagedKV
    theirs: FullKV
    lengths: list[int]

    def append(self, count: int, kept: list[int], seed: int) -> None:
        """`count` columns behind each row's own, of which so many stay; the rest is overwritten later."""
        generator = torch.Generator().manual_seed(seed)
        for full in (self.ours, self.theirs):
            full.reserve(max(self.lengths) + count, CPU)
        for site in self.ours.sites:
            k, v = (
                torch.randn(len(kept), 2, count, size, generator=generator).to(site.dtype)
                for size in (site.head_size, site.value_size)
            )
            for full in (self.ours, self.theirs):
                full.append(site.layer, k, v, self.lengths)
        self.lengths = [length + more for length, more in zip(self.lengths, kept, strict=True)]
        for site in self.ours.sites:
            self.ours.settle(site.layer, self.lengths)

    def select(self, rows: list[int], columns: int) -> Twins:
        """A fork."""
        lengths = [min(self.lengths[row], columns) for row in rows]
        return Twins(self.ours.select(rows, columns), self.theirs.select(rows, columns), lengths)

    def check(self, begin: int, end: int) -> None:
        """Columns [begin, end), of each row as far as it goes."""
        for site in self.ours.sites:
            pairs = list(
                zip(self.ours.read(site.layer, begin, end), self.theirs.read(site.layer, begin, end), strict=True)
            )
            for b, length in enumerate(self.lengths):
                own = slice(0, max(length - begin, 0))
                assert all(torch.equal(ours[b, :, own], theirs[b, :, own]) for ours, theirs in pairs)
            kept = [page for b, row in enumerate(self.ours.pages[site.layer]) for page in row[: self.lengths[b] // 256]]
            assert all(isinstance(page, FilePage) == (self.ours.tier is Tier.DISK) for page in kept)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pages_hold_what_a_resident_cache_holds(make_sites: Sites, tier: Tier, data: st.DataObject) -> None:
    """Sequences side by side: appends at each row's own column, crops, room given back, forks that go on; then any
    range of each row, whatever went to files."""
    sites = make_sites(value_size=24, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    home, held = Home(tier, None, None, Link()), list[Twins]()
    for seed in range(data.draw(st.integers(2, 8))):
        known = [each for each in held if max(each.lengths)]
        ways = ["new", "append", "append", "crop", "fork", "give back"] if known else ["new"]
        what = data.draw(st.sampled_from(ways))
        one = data.draw(st.sampled_from(known)) if known else None
        if what == "crop" and one is not None:
            to = data.draw(st.integers(0, max(one.lengths)))
            one.lengths = [min(length, to) for length in one.lengths]
            continue
        if what == "give back" and one is not None:
            one.ours.give_back(max(one.lengths))
            one.theirs.give_back(max(one.lengths))
            continue
        if what == "fork" and one is not None:
            rows = data.draw(st.lists(st.integers(0, len(one.lengths) - 1), min_size=1, max_size=3))
            one = one.select(rows, data.draw(st.integers(1, max(one.lengths))))
            held.append(one)
        elif what == "new" or one is None:
            batch = data.draw(st.integers(1, 3))
            ours = home.make(sites, batch, Way.SWAPPED)
            assert isinstance(ours, PagedKV)
            one = Twins(ours, FullKV(sites, batch), [0] * batch)
            held.append(one)
        count, batch = data.draw(st.integers(1, 400)), len(one.lengths)
        one.append(count, data.draw(st.lists(st.integers(0, count), min_size=batch, max_size=batch)), seed)
    for each in held:
        begin, end = sorted(data.draw(st.integers(0, max(each.lengths))) for _ in range(2))
        each.check(begin, end)
        each.check(0, max(each.lengths))


@pytest.mark.parametrize(
    ("by_streams", "own", "forked"), [(False, [156, 256, 256, 132], [256, 256, 188]), (True, [800], [512, 188])]
)
def test_what_lies_side_by_side_is_one_copy_where_copies_go_on_streams(
    by_streams: bool, own: list[int], forked: list[int], make_sites: Sites, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that were made together; not the one that a fork has copied."""
    copied: list[int] = []
    copy = Link.copy

    def watched(self: Link, target: Tensor, source: Tensor) -> Iterator[int]:
        copied.append(source.shape[1])
        yield from copy(self, target, source)

    monkeypatch.setattr(Link, "copy", watched)
    monkeypatch.setattr(Link, "by_streams", by_streams)
    full, held = FullKV(make_sites(), 1), make(make_sites(), 1)
    for each in (full, held):
        fill(each, 0, 1000)
    fork = held.select([0], 700)
    assert same(contents(held, 100, 900), contents(full, 100, 900))
    assert copied == [length for length in own for _ in range(2)] * len(held.sites)
    copied.clear()
    assert same(contents(fork, 0, 700), contents(full, 0, 700))
    assert copied == [length for length in forked for _ in range(2)] * len(held.sites)


@pytest.mark.parametrize("tier", TIERS)
def test_forks_share_whole_pages_until_one_writes(make_sites: Sites, fill: Fill, tier: Tier) -> None:
    full = make(make_sites(), 2, tier)
    fill(full, 0, 700)
    for site in full.sites:
        full.settle(site.layer, [700, 700])
    before = contents(full, 0, 600)
    fork = full.select([1, 1, 0], 600)
    assert all(fork.pages[0][b][i] is full.pages[0][r][i] for b, r in ((0, 1), (1, 1), (2, 0)) for i in (0, 1))
    expected = [side[[1, 1, 0]] for side in before]
    assert same(contents(fork, 0, 600), expected)
    fill(full, 100, 600, seed=5)  # the original is cropped, and goes on otherwise
    assert same(contents(fork, 0, 600), expected)
    fill(fork, 0, 50, seed=6)
    assert not same(contents(full, 0, 50), contents(fork, 0, 50))
    assert same(contents(fork, 50, 600), [side[:, :, 50:] for side in expected])


def test_bytes_are_those_of_the_pages(make_sites: Sites, fill: Fill) -> None:
    full = make(make_sites(value_size=24), 3)
    assert full.nbytes == 0
    fill(full, 0, 300)
    held = [page for rows in full.pages for row in rows for page in row]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for p in held for x in (p.keys, p.values)}  # type: ignore[union-attr]
    assert full.nbytes == sum(storage.nbytes() for storage in storages.values())


def test_a_growing_cache_does_not_move(make_sites: Sites, fill: Fill) -> None:
    full = make(make_sites(), 1)
    fill(full, 0, 500)
    before = [page for rows in full.pages for row in rows for page in row]
    fill(full, 500, 3000)
    after = [page for rows in full.pages for row in rows for page in row]
    assert all(any(page is other for other in after) for page in before)


def test_the_disk_holds_what_is_verified_and_host_memory_the_rest(make_sites: Sites, fill: Fill) -> None:
    full = make(make_sites(), 2, Tier.DISK)
    fill(full, 0, 1100)
    for site in full.sites:
        full.settle(site.layer, [1100, 300])
        kinds = [[type(page) for page in row] for row in full.pages[site.layer]]
        assert kinds == [[FilePage] * 4 + [HostPage], [FilePage] + [HostPage] * 4]


def test_a_file_has_no_name_and_goes_with_its_last_page(make_sites: Sites, fill: Fill, tmp_path: Path) -> None:
    full = make(make_sites(), 1, Tier.DISK, tmp_path)
    fill(full, 0, 600)
    full.settle(0, [600])
    assert open_files(tmp_path) == 1
    assert not list(tmp_path.iterdir())
    fork = full.select([0], 512)
    del full
    gc.collect()
    assert open_files(tmp_path) == 1
    assert fork.read(0, 0, 512)[0].isfinite().all()
    del fork
    gc.collect()
    assert open_files(tmp_path) == 0


def test_places_in_a_file_are_used_again(make_sites: Sites, fill: Fill) -> None:
    full = make(make_sites(count=1), 1, Tier.DISK)
    for seed in range(5):
        fill(full, 0, 512, seed=seed)
        full.settle(0, [512])
        held = contents(full, 0, 512)
        assert same(held, contents(full, 0, 512))
    [file] = {id(page.file): page.file for page in files_of(full)}.values()
    gc.collect()
    assert len(file.free) + 2 == pages.GROWTH // file.page_bytes


@pytest.mark.parametrize("fault", ["changed", "cut off", "unreadable"])
def test_what_a_file_does_not_give_back_is_an_error(
    make_sites: Sites, fill: Fill, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = make(make_sites(count=1), 1, Tier.DISK)
    fill(full, 0, 600)
    full.settle(0, [600])
    page = files_of(full)[1]
    descriptor = page.file._file.fileno()
    if fault == "changed":
        os.pwrite(descriptor, b"\x01\x02\x03", page.place * page.file.page_bytes + 1000)
    elif fault == "cut off":
        os.ftruncate(descriptor, page.place * page.file.page_bytes + 1000)
    else:

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(PageLost, match=r"(?s)page of KV.*where.*fix"):
        full.read(0, 0, 600)
    if fault != "unreadable":
        assert full.read(0, 0, 256)[0].shape == (1, 2, 256, 16)


def test_a_full_disk_leaves_pages_in_host_memory(
    make_sites: Sites, fill: Fill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of forks too: it is tried once, and said once."""
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    full, plain = make(make_sites(), 1, Tier.DISK), FullKV(make_sites(), 1)
    for cache in (full, plain):
        fill(cache, 0, 600)
    for site in full.sites:
        full.settle(site.layer, [600])
    assert not files_of(full)
    assert next(r.message for r in caplog.records if "stay in host memory" in r.message).count("fix:") == 1
    assert same(contents(full, 0, 600), contents(plain, 0, 600))
    fork: FullKV = full
    for end in (700, 800, 900):
        fork = fork.select([0], end - 100)
        fill(fork, end - 100, end)
        for site in fork.sites:
            fork.settle(site.layer, [end])
    assert len(caplog.records) == len(tried) == 1


def test_a_folder_that_is_not_there(make_sites: Sites, tmp_path: Path) -> None:
    full = make(make_sites(), 1, Tier.DISK, tmp_path / "missing")
    with pytest.raises(VericacheError, match=r"(?s)No such file.*missing.*kv_folder"):
        full.reserve(600, torch.device("cpu"))


def test_host_memory_that_cannot_be_pinned_is_pageable_and_said_once(
    make_sites: Sites, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = torch.zeros

    def refuse(*shape: object, pin_memory: bool = False, **how: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory. 17 bytes were asked for")
        return zeros(*shape, **how)  # type: ignore[call-overload, no-any-return]

    pages._tell_pageable.cache_clear()
    monkeypatch.setattr(torch, "zeros", refuse)
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        made = [pages.host_pages(make_sites()[0], 256, 2, pinned=True) for _ in range(3)]
    assert all(not page.keys.is_pinned() and not page.keys.any() for held in made for page in held)
    [told] = caplog.records
    assert all(part in told.getMessage() for part in ("could not be pinned", "CUDA error: out of memory\n", "fix:"))
