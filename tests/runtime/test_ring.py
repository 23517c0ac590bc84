"""The ring: what is free in it, what it is large enough for, and what happens where there is no memory for it."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.runtime.ring import ALIGNED, Ring

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 4000), min_size=1, max_size=30), room=st.integers(0, 12000))
def test_claims_never_overlap_and_room_for_one_is_always_found(sizes: list[int], room: int) -> None:
    """Released in the order of claiming, as sites are."""
    ring = Ring()
    ring.fit(room, sizes, 0, CPU)
    held: list[tuple[int, Tensor]] = []
    for number, size in enumerate(sizes):
        while (made := ring.claim(size)) is None:
            assert held, "a site alone fits"
            other, oldest = held.pop(0)
            assert (oldest == other % 251).all(), "overwritten while it was held"
            ring.release(oldest)
        assert made.nbytes == size
        assert made.storage_offset() % ALIGNED == 0
        made.fill_(number % 251)
        held.append((number, made))


def test_all_sites_at_once_where_there_may_be_so_much() -> None:
    ring = Ring()
    ring.fit(1 << 20, [5000, 700, 0, 5000], 0, CPU)
    assert all(ring.claim(size) is not None for size in (5000, 700, 0, 5000))


def test_memory_stays_while_sites_grow_a_little_and_goes_when_they_shrink() -> None:
    ring = Ring()
    ring.fit(1 << 30, [1_000_000] * 4, 0, CPU)
    assert ring.buffer is not None
    first = ring.buffer.data_ptr()
    ring.fit(1 << 30, [1_000_100] * 4, 0, CPU)
    assert ring.buffer.data_ptr() == first
    ring.fit(1 << 30, [100_000] * 4, 0, CPU)
    assert ring.nbytes < 500_000


def test_room_to_put_a_site_together_is_a_part_of_what_it_may_take() -> None:
    ring = Ring()
    ring.fit(10_000, [2000] * 4, 4000, CPU)
    assert ring.whole is not None
    assert ring.whole.nbytes == 4000
    assert ring.nbytes == 10_000
    ring.fit(10_000, [2000] * 4, 3000, CPU)
    assert ring.nbytes == 10_000


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (([60] * 8, 0), ([30] * 8, 40)),
        (([9] * 20, 10), ([9] * 20, 44)),
        (([9] * 20, 48), ([1] * 4, 0)),
    ],
)
def test_it_never_takes_more_than_it_may(first: tuple[list[int], int], then: tuple[list[int], int]) -> None:
    """Also where room to put a site together is needed, or grows, later; and lets go of it where it is not."""
    ring = Ring()
    for needs, whole in (first, then):
        ring.fit(100_000, [1000 * each for each in needs], 1000 * whole, CPU)
        assert ring.nbytes <= 100_000
        assert (ring.whole is not None) == (whole > 0)
    assert ring.nbytes <= 2 * (sum(then[0]) + then[1]) * 1000


class Crowded:
    """A device with memory for so many bytes: the allocation beyond them is refused."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        self._held: list[weakref.ref[Tensor]] = []
        self._zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", self.zeros)

    def zeros(self, size: int, **how: Any) -> Tensor:
        self._held = [held for held in self._held if held() is not None]
        if sum(made.nbytes for held in self._held if (made := held()) is not None) + size > self.room:
            raise torch.OutOfMemoryError("out of memory")
        made = self._zeros(size, **how)
        self._held.append(weakref.ref(made))
        return made


def test_a_ring_is_halved_until_there_is_memory_for_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring = Ring()
    with monkeypatch.context() as crowded, caplog.at_level(logging.WARNING, "vericache_compile"):
        Crowded(1500, crowded)
        ring.fit(1 << 30, [1000] * 4, 0, CPU)
        assert ring.buffer is not None
        assert 1000 <= ring.nbytes <= 1500
        made = ring.buffer.data_ptr()
        ring.fit(1 << 30, [1000] * 4, 0, CPU)
        assert ring.buffer.data_ptr() == made, "halved twice, and not tried again in each round"
        ring.fit(1 << 30, [1400] * 4, 0, CPU)
        assert 1400 <= ring.nbytes <= 1500
    [told] = caplog.records
    assert all(part in told.getMessage() for part in ("it has 1", "where:", "fix:"))


def test_what_it_held_makes_room_for_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    with monkeypatch.context() as crowded:
        Crowded(100_000, crowded)
        ring.fit(1 << 30, [9000] * 20, 10_000, CPU)
        ring.fit(1 << 30, [9000] * 20, 50_000, CPU)
        assert 59_000 <= ring.nbytes <= 100_000


def test_a_ring_that_cannot_grow_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of what comes was seen to pay than there is memory for."""
    ring = Ring()
    with monkeypatch.context() as crowded:
        Crowded(10_000, crowded)
        ring.fit(8000, [1000] * 16, 0, CPU)
        for _ in range(2):
            ring.fit(12_000, [1000] * 16, 0, CPU)
            assert ring.nbytes == 8000


def test_without_memory_for_one_site_the_devices_own_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once there is memory again, the ring is made."""
    ring = Ring()
    with monkeypatch.context() as crowded:
        Crowded(900, crowded)
        with pytest.raises(torch.OutOfMemoryError):
            ring.fit(1 << 30, [1000] * 4, 0, CPU)
    ring.fit(1 << 30, [1000] * 4, 0, CPU)
    assert ring.nbytes >= 4000
