"""Where sequences' full KV is housed, weighed when one begins, is copied, or grows: on the device, or outside it."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch

from vericache_compile.plan import Arrangement, Site, Way
from vericache_compile.runtime.ring import Ring
from vericache_compile.runtime.sequence_table import SequenceTable
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.tiers import Home


@dataclass
class Housing:
    """What one session knows of the room that sequences of its model share."""

    table: SequenceTable
    home: Home
    ring: Ring

    def begin(self, sites: Rows[Site], batch: int, columns: int, device: torch.device) -> Sequence:
        """A new sequence, with room for so many columns; what is garbage, or a ring that no one needs, goes first."""
        if self.home.weighs(device):
            self.table.release_orphans()
            self.table.collect_captured()
            if self.table.all_resident and self.home.link is not None:
                self.home.link.catch_up()  # a round that was given up may still have copies to it under way
                self.ring.clear()
        return self.table.create(sites, batch, columns, device, self.home)

    def grow(self, sequence: Sequence, columns: int, device: torch.device) -> None:
        """Weigh anew how a sequence is decoded where its full KV, which lives on the device, grows to so many columns,
        or another configuration chose."""
        full, mine = sequence.full, sequence.arranged.by == self.home.key
        grows = full.resident and 0 < full.columns < columns
        if mine and (self.home.tier is not None or not grows):
            return
        if self.home.tier is not None or not full.resident:
            way = Way.RESIDENT if full.resident else Way.SWAPPED
            sequence.arranged = Arrangement(way, by=self.home.key)
            return
        arranged = self.home.arrange(full.batch, columns, device, self.table.taken(sequence))
        if arranged.way is Way.SWAPPED:
            sequence.move(self.home, device, arranged)
        elif arranged.way is not sequence.arranged.way:
            sequence.rearrange(arranged)
        self.reserve(sequence, columns, device)

    def reserve(self, sequence: Sequence, columns: int, device: torch.device) -> None:
        """Room for so many columns; in host memory where the device has less of it in one piece than there seemed to
        be, and where full KV lives was for us to choose."""
        try:
            sequence.full.reserve(columns, device)
        except torch.OutOfMemoryError:
            if self.home.tier is not None or not sequence.full.resident:
                raise
            sequence.move(self.home, device, Arrangement(Way.SWAPPED, ring_bytes=0, by=self.home.key))
            sequence.full.reserve(columns, device)

    def arrange_fork(self, sequence: Sequence, rows: int, columns: int) -> Arrangement | None:
        """How a copy of so many rows is decoded; None: as what it is made of. Where the device has no room for it,
        that moves to host memory, which the copy then shares."""
        if not sequence.full.resident or not self.home.weighs(device := sequence.full.keys[0].device):
            return None
        arranged = self.home.arrange(rows, columns, device, self.table.taken())
        if arranged.way is Way.SWAPPED:
            if arranged.ring_bytes is not None:
                arranged = replace(arranged, ring_bytes=arranged.ring_bytes + sequence.on_device)
            sequence.move(self.home, device, arranged)
        return arranged
