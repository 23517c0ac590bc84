"""Sequences: what is known about one cache, as a whole and per row."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.plan import Arrangement, DecodePlan, Staging, Tier, Way
from vericache_compile.runtime import ghosts
from vericache_compile.runtime.caches import DraftKV, FullKV, apart
from vericache_compile.runtime.compression import CHUNK, Early
from vericache_compile.runtime.drawn import Asked, Drawn, Repeated
from vericache_compile.runtime.pace import Pace

if TYPE_CHECKING:
    from vericache_compile.runtime.recovery import Call, Version
    from vericache_compile.runtime.tiers import Home

RESIDENT = Arrangement(Way.RESIDENT)


@dataclass(frozen=True)
class Held:
    """A verified output row that the caller has not asked for yet."""

    column: int
    token: int
    outputs: tuple[Tensor, ...]
    """Row outputs of one round for one row of the batch, each [accepted, 1, ...]; shared by what the round gave it."""
    index: int
    """Which of them."""


@dataclass
class Row:
    """One row of a batch; rows advance on their own."""

    pad: int = 0
    length: int = 0
    """Columns of verified full KV, left padding included."""
    offset: int = 0
    """A token's position less its column."""
    token: int | None = None
    """The token at column `length`: given by the caller, or predicted by the last held row."""
    held: deque[Held] = field(default_factory=deque)
    surprise: int | None = None
    """The last token that the caller fed in place of the predicted one."""
    forced: bool = False
    """Whether the caller keeps feeding the same token whatever is predicted (padding after the end)."""
    served: int = 0
    """Rows that the caller took since the last round."""
    ids: list[int] = field(default_factory=list)
    """Tokens of the first columns: all of them where a compressor wants them, or full KV may be lost."""

    def feed(self, column: int, token: int, offset: int, pad: int) -> None:
        """The caller feeds `token` at `column`; what was held for another history is dropped."""
        if (offset, pad) != (self.offset, self.pad):
            self.offset, self.pad = offset, pad
            self.truncate(column)
        while self.held and self.held[0].column < column:
            self.held.popleft()
        if self.held:
            expected = self.held[0].token if self.held[0].column == column else None
        else:
            expected = self.token if self.length == column else None
        if expected == token:
            self.surprise = self.surprise if self.forced else None
            return
        self.forced = token == self.surprise
        self.surprise = token if expected is not None else None
        self.truncate(column)
        self.token = token

    def truncate(self, column: int) -> None:
        """Forget everything from `column` on."""
        self.length = min(self.length, column)
        del self.ids[column:]
        self.held.clear()
        self.token = None


@dataclass(frozen=True)
class Queries:
    """A row's last queries at a site [H, n, D], oldest first, as they were asked of the keys that are cached."""

    tensor: Tensor
    end: int
    """The column after the newest one's."""

    def within(self, begin: int, end: int) -> Tensor | None:
        """Those of columns [begin, end), the newest of which is the last; None where that one is not held."""
        first, last = (max(at - self.end + self.tensor.shape[1], 0) for at in (begin, end))
        return self.tensor[:, first:last] if self.end >= end and first < last else None


def followed(held: Queries | None, queries: Tensor, column: int, limit: int) -> Queries:
    """The last `limit` queries, once those of the tokens from `column` on, [H, n, D], come after what is held."""
    count, end = queries.shape[1], column + queries.shape[1]
    before = None if held is None or count >= limit else held.within(0, column)
    if before is None:
        return Queries(queries[:, max(count - limit, 0) :].clone(), end)
    return Queries(torch.cat([before[:, max(before.shape[1] + count - limit, 0) :], queries], dim=1), end)


class Sequence:
    """One cache: full KV, compressed KV, held rows, per row."""

    def __init__(self, number: int, full: FullKV, arranged: Arrangement = RESIDENT) -> None:
        batch = full.batch
        self.number = number
        self.full, self.arranged = full, arranged
        self.early: Early | None = None
        self.decode: tuple[DecodePlan, Rows[Any]] | None = None
        """The plan of its latest decode call, and the captured inputs that are weights."""
        self.calls: list[Call] = []
        """Those that ran as captured, where full KV may be lost."""
        self.origin: Rows[int] = range(batch)
        """Of the batch that the last of these ran for, the rows that this one's go on from."""
        self.rows = [Row() for _ in range(batch)]
        self.draft: DraftKV | None = None
        self.has_drafted = False
        """Whether there has been a draft cache."""
        self.queries: list[list[Queries | None]] = [[None] * batch for _ in full.sites]
        """Per site and row."""
        self.pace = Pace()
        self.drawn: Drawn | None = None
        self.asked: Asked | None = None
        """The last round's queries, where what they draw is to be added in the next round or turn."""
        self.repeated: Repeated | None = None
        self.horizon = 0
        """Tokens drafted in the last round (0 before the first)."""
        self.epoch = 0
        self.minted = 0
        """The most columns that a caller was given in this epoch."""
        self.crops: list[tuple[int, int]] = []
        """(epoch begun, columns kept) per cut of history; cuts that a later, deeper one covers are left out."""
        self.live: dict[int, int] = {}
        """Storage pointers of the ghosts that are still alive, with the columns they show."""
        self.version: Version = ()
        """Of the weights that the last round saw."""
        self.cut: set[int] = set()
        """Places (as ghosts spell them) of cache tensors that showed fewer columns than there were."""
        self.forked = False
        self.regular = True
        """Whether the caller's last mask was causal with left padding."""
        self._templates: list[tuple[list[int], Tensor]] = []
        self._templates_epoch = -1

    @property
    def nbytes(self) -> int:
        """Bytes of KV held, full and draft, and of what is noted about it."""
        return self.full.nbytes + self.beside

    @property
    def on_device(self) -> int:
        """Bytes of KV in device memory, the ring left out, which all sequences share."""
        return self.full.nbytes * self.full.resident + (0 if self.draft is None else self.draft.nbytes)

    @property
    def promised(self) -> float:
        """Bytes that its draft cache will take, while there is none."""
        return self.arranged.draft_bytes if self.draft is None else 0.0

    def rearrange(self, arranged: Arrangement, full: FullKV | None = None) -> None:
        """Go on in another way, maybe with the same full KV elsewhere: without what belongs to the way before."""
        self.full, self.arranged = full or self.full, arranged
        self.draft = self.early = self.asked = None
        self.has_drafted, self.pace = False, self.pace.following()

    def move(self, home: Home, device: torch.device, arranged: Arrangement) -> None:
        """Go on with full KV in host memory."""
        held = max(row.length for row in self.rows)
        self.rearrange(arranged, home.moved(self.full, held, device))

    def staging(self, planned: Staging | None) -> Staging | None:
        """The ring that a plan has, as large as this sequence may have it."""
        return planned and replace(planned, most=self.arranged.ring_bytes)

    @property
    def beside(self) -> int:
        """Bytes held beside full KV."""
        return self.apart + sum(x.nbytes for x in (self.draft, self.drawn, self.repeated) if x is not None)

    @property
    def apart(self) -> int:
        """Bytes in host memory of what regions leave out."""
        draft = 0 if self.draft is None else self.draft.apart
        return draft + (0 if self.early is None else apart(self.early.remainders))

    def sets_apart(self, compressor: Compressor, columns: int, staging: Staging | None) -> bool:
        """Whether it pays to set apart what regions over so many columns leave out, so that no round brings the rest.

        Not where all of full KV can come while drafts read their weights alone; nor for regions that are soon
        made anew: those of a fork (a beam lives for one token), or of a method that chooses anew all the time.
        """
        staging = self.staging(staging)
        if staging is None or self.full.tier is not Tier.HOST or not compressor.is_lasting or self.forked:
            return False
        full = self.full.batch * columns * sum(site.bytes_per_token for site in self.full.sites)
        return full > staging.bytes_beside(0)

    def take_early(self, compressor: Compressor, columns: Rows[int]) -> Early | None:
        """What prefill made for this compressor, once; None where there is nothing that still holds."""
        early, self.early = self.early, None
        if early is None or early.compressor is not compressor or early.pads != [row.pad for row in self.rows]:
            return None
        spare = [
            column - row.pad - region.covered
            for regions in early.regions
            for row, column, region in zip(self.rows, columns, regions, strict=True)
        ]
        return early if min(spare) >= 0 and max(spare) <= CHUNK else None

    @property
    def calls_end(self) -> int:
        """Columns up to the end of the last call that ran as captured, where these are known."""
        return self.calls[-1].column + self.calls[-1].count if self.calls else 0

    def cut_calls(self, columns: int) -> None:
        """What calls computed from column `columns` on no longer stands: rows are those of the call before, where they
        had come from there and as they were.
        """
        while self.calls and self.calls[-1].column >= columns:
            dropped = self.calls.pop()
            for row, place in zip(self.rows, self.origin, strict=True):
                row.pad, row.offset = dropped.before[place].pad, dropped.before[place].offset
            self.origin = [dropped.origin[place] for place in self.origin]
        if self.calls_end > columns:
            self.calls[-1] = replace(self.calls[-1], count=columns - self.calls[-1].column)

    def asked_within(self, layer: int, pads: Rows[int], columns: Rows[int]) -> list[Tensor | None]:
        """The last queries [H, n, D] of each row's columns [pads[b], columns[b]) at a site; None where not seen."""
        held = zip(self.queries[layer], pads, columns, strict=True)
        return [None if queries is None else queries.within(pad, column) for queries, pad, column in held]

    def truncate(self, columns: int) -> None:
        """Forget every row's history from `columns` on."""
        for row in self.rows:
            row.truncate(columns)
        self.early = None
        self.cut_calls(columns)
        self.epoch += 1
        self.minted = columns
        while self.crops and self.crops[-1][1] >= columns:
            self.crops.pop()
        self.crops.append((self.epoch, columns))

    def templates(self, device: torch.device) -> list[tuple[list[int], Tensor]]:
        """(places, ghost columns [P, B, K, 1, D] that spell them), one per shape of cache tensor."""
        if self._templates_epoch != self.epoch:
            shapes: dict[tuple[int, int, torch.dtype], list[int]] = {}
            for site in self.full.sites:
                for side, size in enumerate(site.cached_sizes):
                    shapes.setdefault((site.kv_heads, size, site.dtype), []).append(2 * site.layer + side)
            self._templates = [
                (places, ghosts.spell([self._names(place) for place in places], heads, size, dtype, device))
                for (heads, size, dtype), places in shapes.items()
            ]
            self._templates_epoch = self.epoch
        return self._templates

    def _names(self, place: int) -> list[ghosts.Name]:
        return [ghosts.Name(self.number, self.epoch, b, place) for b in range(len(self.rows))]

    def still_holds(self, epoch: int, columns: int) -> bool:
        """Whether the first `columns` columns are what they were in `epoch`."""
        later = itertools.takewhile(lambda crop: crop[0] > epoch, reversed(self.crops))
        return all(kept >= columns for _, kept in later) and all(row.length >= columns for row in self.rows)

    def fork(self, number: int, rows: Rows[int], columns: int) -> Sequence:
        """A new sequence of the given rows (repeats allowed), holding the first `columns` columns."""
        made = Sequence(number, self.full.select(rows, columns), self.arranged)
        made.forked, made.pace = True, self.pace.following()
        made.regular, made.version, made.horizon, made.cut = self.regular, self.version, self.horizon, set(self.cut)
        for new, old in zip(made.rows, (self.rows[r] for r in rows), strict=True):
            new.pad, new.offset, new.length = old.pad, old.offset, min(old.length, columns)
            new.served, new.ids = old.served, old.ids[:columns]
        made.queries = [[held[r] for r in rows] for held in self.queries]
        if list(rows) == list(range(len(self.rows))):
            made.decode = self.decode
        made.calls, made.origin = list(self.calls), [self.origin[r] for r in rows]
        made.cut_calls(columns)
        made.drawn = self.drawn.select(rows) if self.drawn is not None else None
        made.asked = self.asked.select(rows) if self.asked is not None else None
        made.repeated = self.repeated.select(rows).cut([columns] * len(rows)) if self.repeated is not None else None
        return made
