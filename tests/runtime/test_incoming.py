"""A round's full KV on its way: order, back-pressure, and what is there when attention reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.spec import parse
from vericache_compile.plan import Site, Staging, Tier
from vericache_compile.runtime.caches import DraftKV, FullKV
from vericache_compile.runtime.compression import compress
from vericache_compile.runtime.incoming import Incoming, PagedIncoming, incoming
from vericache_compile.runtime.ring import Ring
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
    made.reserve(600, torch.device("cpu"))
    return made


@pytest.fixture
def paged(full: FullKV, fill: Fill) -> PagedKV:
    """The same in host memory."""
    made = PagedKV(full.sites, 2, Tier.HOST, None, Link())
    fill(made, 0, 500)
    made.reserve(600, torch.device("cpu"))
    return made


def draft_of(full: FullKV, method: str) -> DraftKV:
    unseen: list[list[Tensor | None]] = [[None, None] for _ in full.sites]
    return compress(parse(method, {}), full, PADS, COLUMNS, unseen, 2 * WINDOW, apart=isinstance(full, PagedKV))


def open_round(full: FullKV, ring: Ring, share: float, method: str = "streaming(keep=0.2)") -> PagedIncoming:
    """A round whose ring may take so much of full KV; what it then takes is full of NaN."""
    room = full.batch * full.columns * sum(site.bytes_per_token for site in full.sites)
    made = incoming(full, draft_of(full, method), ring, Staging(int(share * room), full.columns), COLUMNS, PADS)
    assert isinstance(made, PagedIncoming)
    for held in (ring.buffer, ring.whole):
        if held is not None:
            spoil(held)
    return made


def spoil(held: Tensor) -> None:
    held[: held.nbytes // 4 * 4].view(torch.float32).fill_(float("nan"))


def window(full: FullKV, layer: int) -> tuple[Tensor, Tensor]:
    site, generator = full.sites[layer], torch.Generator().manual_seed(layer)
    shape = (full.batch, site.kv_heads, WINDOW)
    return tuple(torch.randn(*shape, size, generator=generator) for size in (site.head_size, site.value_size))  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("method", ["streaming(keep=0.2)", "snapkv(keep=0.2)", "kivi"])
def test_attention_reads_what_it_would_on_the_device(full: FullKV, paged: PagedKV, share: float, method: str) -> None:
    """From each row's first block to its window; beyond there are zeros, whatever lay there before."""
    ring = Ring()
    for _ in range(2):
        coming = open_round(paged, ring, share, method)
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
        assert all(torch.equal(a, b) for a, b in zip(paged.read(3, 0, 434), full.read(3, 0, 434), strict=True))


def test_rows_of_which_nothing_was_set_apart_come_beside_those_of_which_something_was(
    full: FullKV, paged: PagedKV
) -> None:
    draft = draft_of(paged, "snapkv(keep=0.2)")
    for layer, held in enumerate(draft.layers[:3]):
        held.remainders[layer % 2] = None
    coming = PagedIncoming(paged, draft, Ring(), 1 << 20, COLUMNS, PADS)
    for layer in range(4):
        keys, values = coming.wait(layer)
        for b, (pad, column) in enumerate(zip(PADS, COLUMNS, strict=True)):
            seen = slice(pad // 256 * 256, column)
            assert torch.equal(keys[b, :, seen], full.keys[layer][b, :, seen])
            assert torch.equal(values[b, :, seen], full.values[layer][b, :, seen])
        coming.release(layer)
    coming.close()


@pytest.mark.usefixtures("interpreted")
def test_the_gpus_kernel_puts_the_same_together(full: FullKV, paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 0.0, "adakv(keep=0.2)")
    keys, values = coming.wait(0)
    for b, (pad, column) in enumerate(zip(PADS, COLUMNS, strict=True)):
        seen = slice(pad // 256 * 256, column)
        assert torch.equal(keys[b, :, seen], full.keys[0][b, :, seen])
        assert torch.equal(values[b, :, seen], full.values[0][b, :, seen])
    coming.close()


def test_a_sliding_layer_takes_its_window_of_the_ring(full: FullKV, paged: PagedKV) -> None:
    reaches = (60, None, 60, None)
    coming = PagedIncoming(paged, None, Ring(), 1 << 20, COLUMNS, PADS, reaches)
    assert coming._bytes(0) < coming._bytes(1) / 2
    for layer in range(4):
        keys, values = coming.wait(layer)
        for b, (pad, column) in enumerate(zip(PADS, COLUMNS, strict=True)):
            seen = slice(pad if layer % 2 else column + 1 - 60, column)
            assert torch.equal(keys[b, :, seen], full.keys[layer][b, :, seen])
            assert torch.equal(values[b, :, seen], full.values[layer][b, :, seen])
        coming.release(layer)
    coming.close()


def test_a_transfer_begins_when_there_is_room(paged: PagedKV) -> None:
    """For a site that is put together elsewhere that is once it is, for any other once it was attended to."""
    for method, after_wait in (("kivi", [0, 1]), ("streaming(keep=0.2)", [1, 2])):
        coming = open_round(paged, Ring(), 0.5, method)
        size, beside = coming._bytes(0), coming._whole_bytes(0) if after_wait[0] else 0
        coming.ring.fit(beside + 2 * size + 600, [size] * 4, beside, paged.device)
        coming.prefetch(0)
        assert list(coming._under_way) == [0, 1]
        coming.wait(0)
        assert list(coming._under_way) == after_wait
        coming.release(0)
        assert list(coming._under_way) == [1, 2]
        coming.close()


def test_asking_twice_is_asking_once_and_a_wait_asks_by_itself(paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 2.0)
    coming.prefetch(0)
    coming.prefetch(0)
    for layer in range(4):
        coming.wait(layer)
        coming.wait(layer)
        coming.release(layer)
    traffic, spans = coming.traffic()
    assert [span.layer for span in spans] == [0, 1, 2, 3]
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
    """And whatever lay there before, attention then reads what it would on the device."""
    coming = open_round(paged, Ring(), 2.0, method)
    keys, values = coming.wait(0)
    firsts = [pad // 256 * 256 for pad in PADS]
    for b, (first, column) in enumerate(zip(firsts, COLUMNS, strict=True)):
        assert torch.equal(keys[b, :, first:column], full.keys[0][b, :, first:column])
        assert torch.equal(values[b, :, first:column], full.values[0][b, :, first:column])
    columns = sum(end - held - first for end, held, first in zip(COLUMNS, HELD[method], firsts, strict=True))
    assert coming.traffic()[0].nbytes == columns * paged.sites[0].bytes_per_token
    coming.close()


def test_a_wait_that_nobody_would_end_is_our_own_error(paged: PagedKV) -> None:
    coming = open_round(paged, Ring(), 0.0, "kivi")
    coming.wait(0)
    with pytest.raises(AssertionError, match="site 1 waits for room in the ring that nobody will make"):
        coming.wait(1)
    coming.close()


def test_a_round_that_was_given_up_leaves_nothing_under_way(paged: PagedKV, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy_to = PagedKV.copy_to

    def note(self: PagedKV, layer: int, *args: object) -> Iterator[int]:
        yield from copy_to(self, layer, *args)  # type: ignore[arg-type]
        copied.append(layer)

    coming = open_round(paged, Ring(), 0.5)
    monkeypatch.setattr(PagedKV, "copy_to", note)
    coming.prefetch(0)
    begun = len(coming._under_way)
    coming.close()
    assert 1 < begun < 4
    of_a_site = 4  # of each row what is before the region, and what is behind it
    assert copied == [layer for layer in range(begun) for _ in range(of_a_site)]
    assert all(transfer.done for _, transfer in coming._under_way.values())


def test_a_failed_transfer_fails_its_own_wait_only(paged: PagedKV, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_to = PagedKV.copy_to

    def broken(self: PagedKV, layer: int, *args: object) -> Iterator[int]:
        if layer == 1:
            raise OSError("the link is down")
        yield from copy_to(self, layer, *args)  # type: ignore[arg-type]

    coming = open_round(paged, Ring(), 2.0)
    monkeypatch.setattr(PagedKV, "copy_to", broken)
    coming.wait(0)
    coming.release(0)
    with pytest.raises(OSError, match="link is down"):
        coming.wait(1)
    coming.wait(2)
    coming.close()


def test_a_resident_cache_is_there_at_once(full: FullKV) -> None:
    coming = incoming(full, draft_of(full, "none"), Ring(), None, COLUMNS, PADS)
    assert type(coming) is Incoming
    coming.prefetch(0)
    keys, values = coming.wait(0)
    assert keys is full.keys[0]
    assert values is full.values[0]
    assert coming.traffic()[0].nbytes == 0


@pytest.mark.parametrize(("per_draft_byte", "grows"), [(0.01, True), (0.0, False)])
def test_the_ring_has_room_for_what_was_seen_to_come(
    full: FullKV, paged: PagedKV, per_draft_byte: float, grows: bool
) -> None:
    """Unless its size was given; and it keeps it when less is seen, or nothing yet by another sequence."""
    ring, staging = Ring(), Staging(0, full.columns, per_draft_byte)
    sizes = []
    for seen in (0, 1 << 30, 0):
        incoming(paged, draft_of(full, "kivi"), ring, staging, COLUMNS, PADS, (), seen).close()
        sizes.append(ring.nbytes)
    whole = full.batch * paged.columns * sum(site.bytes_per_token for site in full.sites)
    assert sizes[0] < whole / 3
    assert (sizes[1] >= whole) == grows
    assert (sizes[1] > sizes[0]) == grows
    assert sizes[2] == sizes[1]
