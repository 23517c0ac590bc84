"""Device memory that sites' full KV comes to, in turn, and where one site's is put together.

A number of bytes, not of slots: a site takes as many as come of it. They are claimed and released in the order of the
sites, so that what is free lies behind the newest, or before the oldest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.plan import rounded

log = logging.getLogger(__name__)
ALIGNED = 512
"""Bytes at whose multiples claims begin."""


class Ring:
    """Kept between the rounds of one model."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        """What transfers write to (uint8)."""
        self.whole: Tensor | None = None
        """Room for one site's full KV (uint8); None until it is needed."""
        self.seen = 0
        """The most that was seen to come while a round drafted, in bytes."""
        self._asked = 0
        self._claimed: list[tuple[int, int]] = []
        self._told = False

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return _size(self.buffer) + _size(self.whole)

    def clear(self) -> None:
        """Give all memory back."""
        self._claimed.clear()
        self.buffer = self.whole = None

    def fit(self, nbytes: int, needs: Sequence[int], whole: int, device: torch.device) -> None:
        """Have room for sites that need so many bytes each, in no more than `nbytes`, though for the largest at least.

        Of these `whole` are for putting a site together. All claims are forgotten. Less where the device has no
        memory for so much: what there was, or half of it, and so on. Raises torch.OutOfMemoryError where there is none
        for one site.
        """
        self._claimed.clear()
        least = max(needs)
        wanted = max(min(nbytes - whole, rounded(sum(map(aligned, needs)))), least)
        if not (self._suits(wanted, least, whole, device) and self.nbytes <= max(nbytes, least + whole)):
            before = _size(self.buffer)
            self.buffer = self.whole = None  # their memory may be what the next ones take
            self.whole = _allocate(whole, device) if whole else None
            self.buffer = self._allocate(wanted, least, before, device)
            self._asked = wanted  # not what there was: what there is no memory for is not tried in each round

    def _suits(self, wanted: int, least: int, whole: int, device: torch.device) -> bool:
        """Whether what is held is large enough, and no more than twice what is needed."""
        held, room = self.buffer, _size(self.whole)
        there = held is not None and held.device == device and held.nbytes >= least
        return there and wanted <= self._asked <= 2 * wanted and whole <= room <= 2 * whole

    def claim(self, nbytes: int) -> Tensor | None:
        """So many bytes of the buffer; None where they are not free."""
        assert self.buffer is not None, "claimed before there is a ring"
        behind = aligned(self._claimed[-1][1]) if self._claimed else 0
        for begin in (behind, 0):
            end = begin + nbytes
            free = all(other_end <= begin or end <= other for other, other_end in self._claimed)
            if free and end <= self.buffer.nbytes:
                self._claimed.append((begin, end))
                return self.buffer[begin:end]
        return None

    def release(self, held: Tensor) -> None:
        """What was claimed is free again."""
        begin = int(held.storage_offset())
        self._claimed.remove((begin, begin + held.nbytes))

    def _allocate(self, wanted: int, least: int, before: int, device: torch.device) -> Tensor:
        size = wanted
        while (made := _try(size, device, raises=size <= least)) is None:
            size = max(before if before < size else 0, size // 2, least)
        if size < wanted and not self._told:
            self._told = True
            log.warning(
                "vericache: no device memory for a ring of %d bytes for full KV, it has %d: transfers begin later\n"
                "  where: %s, %d bytes for the largest site\n  fix: free device memory, or give staging_mb; rows are "
                "the same",
                wanted,
                size,
                device,
                least,
            )
        return made


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-nbytes // ALIGNED) * ALIGNED


def _size(held: Tensor | None) -> int:
    return 0 if held is None else held.nbytes


def _try(nbytes: int, device: torch.device, *, raises: bool) -> Tensor | None:
    """So many bytes, or None where there is no memory for them, unless that `raises`."""
    try:
        return _allocate(nbytes, device)
    except torch.OutOfMemoryError:
        if raises:
            raise
        return None


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
