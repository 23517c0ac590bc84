"""The ring: order, back-pressure, and what a slot holds when attention reads it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.spec import parse
from vericache_compile.plan import Site, Tier
from vericache_compile.runtime.caches import DraftKV, FullKV
from vericache_compile.runtime.compression import compress
from vericache_compile.runtime.slots import Incoming, PagedIncoming, Ring, incoming
from vericache_compile.runtime.tiers import PagedKV
from vericache_compile.runtime.transfers import Link

Sites = Callable[..., list[Site]]
Fill = Callable[..., None]
COLUMNS, PADS, WINDOW = [500, 430], [0, 300], 4


@pytest.fixture
def full(make_sites: Sites, fill: Fill) -> FullKV:
    """Two rows on the device: the reference."""
    made = FullKV(make_sites(count=4, value_size=24), 2)
    fill(made, 0, 500)
    made.reserve(504, torch.device("cpu"))
    return made


@pytest.fixture
def paged(full: FullKV, fill: Fill) -> PagedKV:
    """The same in host memory."""
    made = PagedKV(full.sites, 2, Tier.HOST, None, Link())
    fill(made, 0, 500)
    made.reserve(504, torch.device("cpu"))
    return made


def draft_of(full: FullKV, method: str) -> DraftKV:
    unseen: list[list[Tensor | None]] = [[None, None] for _ in full.sites]
    return compress(parse(method, {}), full, PADS, COLUMNS, unseen, 2 * WINDOW, apart=isinstance(full, PagedKV))


def open_round(full: FullKV, ring: Ring, slots: int, method: str = "streaming(keep=0.2)") -> PagedIncoming:
    """A round whose ring has so many slots."""
    slot = full.batch * full.columns * max(site.bytes_per_token for site in full.sites)
    made = incoming(full, draft_of(full, method), ring, slots * slot, COLUMNS, PADS)
    assert isinstance(made, PagedIncoming)
    return made


def window(full: FullKV, layer: int) -> tuple[Tensor, Tensor]:
    site, generator = full.sites[layer], torch.Generator().manual_seed(layer)
    shape = (full.batch, site.kv_heads, WINDOW)
    return tuple(torch.randn(*shape, size, generator=generator) for size in (site.head_size, site.value_size))  # type: ignore[return-value]


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
def test_a_slot_holds_what_the_device_would(full: FullKV, paged: PagedKV, slots: int) -> None:
    """From each row's first block to its window; beyond there are zeros, whatever lay there before."""
    ring = Ring()
    for _ in range(2):
        coming = open_round(paged, ring, slots)
        assert len(ring.slots) == min(slots, 4)
        for layer in range(4):
            coming.prefetch(layer)
        for layer in range(4):
            keys, values = coming.wait(layer)
            k, v = window(full, layer)
            coming.append(layer, k, v)
            full.append(layer, k, v, COLUMNS)
            for ours, theirs in ((keys, full.keys[layer]), (values, full.values[layer])):
                for b, (pad, column) in enumerate(zip(PADS, COLUMNS, strict=True)):
                    seen = slice(pad // 256 * 256, column + WINDOW)
                    assert torch.equal(ours[b, :, seen], theirs[b, :, seen])
                    assert not ours[b, :, column + WINDOW : 512].any()
            coming.release(layer)
        coming.close()
        for slot in ring.slots:
            slot.view(torch.float32).fill_(float("nan"))
        assert all(torch.equal(a, b) for a, b in zip(paged.read(3, 0, 434), full.read(3, 0, 434), strict=True))


def test_a_transfer_begins_when_a_slot_is_free(paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 2)
    for layer in range(4):
        coming.prefetch(layer)
    assert list(coming._under_way) == [0, 1]
    coming.wait(0)
    coming.release(0)
    assert list(coming._under_way) == [1, 2]
    coming.close()


def test_asking_twice_is_asking_once_and_a_wait_asks_by_itself(paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 4)
    coming.prefetch(0)
    coming.prefetch(0)
    for layer in range(4):
        coming.wait(layer)
        coming.wait(layer)
    assert [span.layer for span in coming.traffic()[1]] == [0, 1, 2, 3]
    traffic, spans = coming.traffic()
    assert traffic.nbytes == sum(span.nbytes for span in spans) > 0
    assert traffic.seconds == sum(span.seconds for span in spans) > 0
    coming.close()


HELD = {
    "none": (500, 130),
    "streaming(keep=0.2)": (100, 26),
    "refreekv(whole=4)": (500, 130),
    "snapkv(keep=0.2)": (32 + 94, 32 + 20),
    "adakv(keep=0.2)": (32 + 94, 32 + 20),
    "tova(keep=0.2)": (1 + 100, 1 + 26),
    "knorm(keep=1.0)": (500, 130),
    "streaming(keep=0.5) | kivi": (0, 0),
    "kivi": (52, 34),
}
"""By method: the tokens of each row that a draft cache holds as they are."""


@pytest.mark.parametrize("method", HELD)
def test_only_what_the_draft_does_not_hold_exactly_is_brought(full: FullKV, paged: PagedKV, method: str) -> None:
    """And whatever lay in the slot before, it then holds what the device would."""
    ring = Ring()
    ring.fit(paged, 1 << 30)
    for slot in ring.slots:
        slot.view(torch.float32).fill_(float("nan"))
    coming = open_round(paged, ring, len(ring.slots), method)
    keys, values = coming.wait(0)
    firsts = [pad // 256 * 256 for pad in PADS]
    for b, (first, column) in enumerate(zip(firsts, COLUMNS, strict=True)):
        assert torch.equal(keys[b, :, first:column], full.keys[0][b, :, first:column])
        assert torch.equal(values[b, :, first:column], full.values[0][b, :, first:column])
    columns = sum(end - held - first for end, held, first in zip(COLUMNS, HELD[method], firsts, strict=True))
    assert coming.traffic()[0].nbytes == columns * paged.sites[0].bytes_per_token
    coming.close()


def test_a_wait_that_nobody_would_end_is_our_own_error(paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 1)
    coming.wait(0)
    with pytest.raises(AssertionError, match="site 1 waits for a slot that nobody will release"):
        coming.wait(1)
    coming.close()


def test_a_round_that_was_given_up_leaves_nothing_under_way(paged: PagedKV, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy_to = PagedKV.copy_to

    def note(self: PagedKV, layer: int, *args: object) -> Iterator[int]:
        yield from copy_to(self, layer, *args)  # type: ignore[arg-type]
        copied.append(layer)

    coming = open_round(paged, Ring(), 2)
    monkeypatch.setattr(PagedKV, "copy_to", note)
    for layer in range(4):
        coming.prefetch(layer)
    coming.close()
    assert copied == [0] * 4 + [1] * 4, "of each row what is before the region, and what is behind it"
    assert all(transfer.done for _, transfer in coming._under_way.values())


def test_a_failed_transfer_fails_its_own_wait_only(paged: PagedKV, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_to = PagedKV.copy_to

    def broken(self: PagedKV, layer: int, *args: object) -> Iterator[int]:
        if layer == 1:
            raise OSError("the link is down")
        yield from copy_to(self, layer, *args)  # type: ignore[arg-type]

    coming = open_round(paged, Ring(), 4)
    monkeypatch.setattr(PagedKV, "copy_to", broken)
    coming.wait(0)
    with pytest.raises(OSError, match="link is down"):
        coming.wait(1)
    coming.wait(2)
    coming.close()


def test_a_resident_cache_is_there_at_once(full: FullKV) -> None:
    coming = incoming(full, draft_of(full, "none"), Ring(), 0, COLUMNS, PADS)
    assert type(coming) is Incoming
    coming.prefetch(0)
    keys, values = coming.wait(0)
    assert keys is full.keys[0]
    assert values is full.values[0]
    assert coming.traffic()[0].nbytes == 0


class Crowded:
    """A device with memory for so many slots: the allocation after them is refused."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        self._held: list[weakref.ref[Tensor]] = []
        self._zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", self.zeros)

    def zeros(self, size: int, **how: Any) -> Tensor:
        self._held = [held for held in self._held if held() is not None]
        if len(self._held) == self.room:
            raise torch.OutOfMemoryError("out of memory")
        made = self._zeros(size, **how)
        self._held.append(weakref.ref(made))
        return made


def test_a_ring_is_halved_until_there_is_memory_for_it_and_says_so_once(
    full: FullKV, paged: PagedKV, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring = Ring()
    with monkeypatch.context() as crowded, caplog.at_level(logging.WARNING, "vericache_compile"):
        Crowded(1, crowded)
        ring.fit(paged, 1 << 30)
        made = ring.slots[0].data_ptr()
        ring.fit(paged, 1 << 30)
        assert [slot.data_ptr() for slot in ring.slots] == [made], "halved twice, and not tried again in each round"
        paged.reserve(1200, torch.device("cpu"))
        ring.fit(paged, 1 << 30)
        assert len(ring.slots) == 1
    [told] = caplog.records
    assert all(part in told.getMessage() for part in ("4 slots", "there are 1", "where:", "fix:"))
    coming = PagedIncoming(paged, draft_of(full, "none"), ring, COLUMNS, PADS)
    for layer in range(4):
        coming.prefetch(layer)
    for layer in range(4):
        keys, _ = coming.wait(layer)
        assert torch.equal(keys[0, :, :500], full.keys[layer][0, :, :500])
        coming.release(layer)
    coming.close()


def test_without_memory_for_a_single_slot_the_devices_own_error_is_raised(
    paged: PagedKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once there is memory again, the ring is made."""
    ring = Ring()
    with monkeypatch.context() as crowded:
        Crowded(0, crowded)
        with pytest.raises(torch.OutOfMemoryError):
            ring.fit(paged, 1 << 30)
    ring.fit(paged, 1 << 30)
    assert len(ring.slots) == 4
