"""Sequences: what is known about one cache, and how a caller's tensors find it again."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.errors import GhostError
from vericache_compile.plan import DecodePlan, Site
from vericache_compile.runtime import ghosts
from vericache_compile.runtime.caches import DraftKV, FullKV
from vericache_compile.runtime.compression import CHUNK, Regions
from vericache_compile.runtime.drawn import Drawn, Repeated
from vericache_compile.runtime.pace import Pace
from vericache_compile.runtime.tiers import Home

CPU = torch.device("cpu")
if TYPE_CHECKING:
    from vericache_compile.runtime.mirrors import Mirror
    from vericache_compile.runtime.recovery import Call

REBUILD = "run the prompt again, or keep the cache that it was copied from alive and uncropped while copies are in use"
CROPPED = "an older state of a cache that was cropped below it since then"
HERE = "the cache of this call"


def _history(names: list[ghosts.Name]) -> list[tuple[int, int, int]]:
    """What all cache tensors of one call must agree on."""
    return [(name.sequence, name.epoch, name.row) for name in names]


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


@dataclass
class Queries:
    """The last queries of a site [B, H, w, D], and how many of the w are real per row."""

    tensor: Tensor
    counts: list[int]

    def row(self, b: int) -> Tensor | None:
        """The row's real queries [H, n, D], oldest first (None when there are none)."""
        return self.tensor[b, :, : self.counts[b]] if self.counts[b] else None


@dataclass
class Early:
    """Regions that prefill made while each site's keys and values were on the device anyway."""

    compressor: Compressor
    pads: list[int]
    regions: Regions


class Sequence:
    """One cache: full KV, compressed KV, held rows, per row."""

    def __init__(self, number: int, full: FullKV) -> None:
        batch = full.batch
        self.number = number
        self.full = full
        self.early: Early | None = None
        self.decode: tuple[DecodePlan, Rows[Any]] | None = None
        """The plan of its latest decode call, and the captured inputs that are weights."""
        self.calls: list[Call] = []
        """Those that ran as captured, where full KV may be lost."""
        self.rows = [Row() for _ in range(batch)]
        self.draft: DraftKV | None = None
        self.queries: list[Queries | None] = [None] * len(full.sites)
        self.pace = Pace()
        self.drawn: Drawn | None = None
        self.repeated: Repeated | None = None
        self.horizon = 0
        """Tokens drafted in the last round (0 before the first)."""
        self.epoch = 0
        self.crops: list[tuple[int, int]] = []
        """(epoch begun, columns kept) per cut of history; cuts that a later, deeper one covers are left out."""
        self.live: dict[int, int] = {}
        """Storage pointers of the ghosts that are still alive, with the columns they show."""
        self.version = 0
        """Of the weights that the last call saw: where they lie, and autograd's version counters."""
        self.cut: set[int] = set()
        """Places (as ghosts spell them) of cache tensors that showed fewer columns than there were."""
        self.regular = True
        """Whether the caller's last mask was causal with left padding."""
        self._templates: list[tuple[list[int], Tensor]] = []
        self._templates_epoch = -1

    @property
    def nbytes(self) -> int:
        """Bytes of KV held, full and draft, and of what is noted about it."""
        return sum(x.nbytes for x in (self.full, self.draft, self.drawn, self.repeated) if x is not None)

    def take_early(self, compressor: Compressor, columns: Rows[int]) -> Regions | None:
        """The regions that prefill made for this compressor, once; None where there are none that still hold."""
        early, self.early = self.early, None
        if early is None or early.compressor is not compressor or early.pads != [row.pad for row in self.rows]:
            return None
        spare = [
            column - row.pad - region.covered
            for regions in early.regions
            for row, column, region in zip(self.rows, columns, regions, strict=True)
        ]
        return early.regions if min(spare) >= 0 and max(spare) <= CHUNK else None

    def cut_calls(self, columns: int) -> None:
        """What calls computed from column `columns` on no longer stands."""
        held = (call for call in self.calls if call.column < columns)
        self.calls = [replace(call, count=min(call.count, columns - call.column)) for call in held]

    def truncate(self, columns: int) -> None:
        """Forget every row's history from `columns` on."""
        for row in self.rows:
            row.truncate(columns)
        self.early = None
        self.cut_calls(columns)
        self.epoch += 1
        while self.crops and self.crops[-1][1] >= columns:
            self.crops.pop()
        self.crops.append((self.epoch, columns))

    def templates(self, device: torch.device) -> list[tuple[list[int], Tensor]]:
        """(places, ghost columns [P, B, K, 1, D] that spell them), one per shape of cache tensor."""
        if self._templates_epoch != self.epoch:
            shapes: dict[tuple[int, int, torch.dtype], list[int]] = {}
            for site in self.full.sites:
                shapes.setdefault((site.kv_heads, site.head_size, site.dtype), []).append(2 * site.layer)
                shapes.setdefault((site.kv_heads, site.value_size, site.dtype), []).append(2 * site.layer + 1)
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
        made = Sequence(number, self.full.select(rows, columns))
        made.regular, made.version, made.horizon, made.cut = self.regular, self.version, self.horizon, set(self.cut)
        for new, old in zip(made.rows, (self.rows[r] for r in rows), strict=True):
            new.pad, new.offset, new.length = old.pad, old.offset, min(old.length, columns)
            new.served, new.ids = old.served, old.ids[:columns]
        for layer, queries in enumerate(self.queries):
            if queries is not None:
                counts = [queries.counts[r] for r in rows]
                made.queries[layer] = Queries(queries.tensor[list(rows)], counts)
        if list(rows) == list(range(len(self.rows))):
            made.calls, made.decode = list(self.calls), self.decode
            made.cut_calls(columns)
        made.drawn = self.drawn.select(rows) if self.drawn is not None else None
        made.repeated = self.repeated.select(rows) if self.repeated is not None else None
        return made


class Minted(NamedTuple):
    """What is known of a ghost by its data pointer."""

    sequence: Sequence
    epoch: int
    place: int
    """Which cache tensor: twice the layer, plus one for values."""
    total: int
    """Columns that were cached when it was made."""
    shown: int
    """Columns of these that it showed then: the newest, fewer than all for a sliding layer."""
    storage: int
    """Pointer of the storage that it shares with other places."""


class SequenceTable:
    """All sequences of one model: found by a ghost's storage, or by what a copied ghost spells."""

    _numbers = itertools.count(1)
    """One count for the whole process, so that a ghost of one model never names a sequence of another."""

    def __init__(self) -> None:
        self._by_storage: dict[int, Minted] = {}
        """By data pointer."""
        self._by_number: dict[int, Sequence] = {}
        self.mirrors: dict[int, Mirror] = {}
        """Sequences that copy a caller's buffers, by data pointer of the first buffer."""

    def create(
        self, sites: Rows[Site], batch: int, columns: int = 0, device: torch.device = CPU, home: Home | None = None
    ) -> Sequence:
        """A new, empty sequence for `columns` columns, whose full KV lives at `home` (on the device where not given).

        Sequences without live ghosts are released first.
        """
        self.release_orphans()
        taken = sum(held.full.nbytes for held in self._by_number.values() if held.full.resident)
        taken += sum(mirror.sequence.full.nbytes for mirror in self.mirrors.values())
        made = Sequence(next(self._numbers), (home or Home()).make(sites, batch, columns, device, taken))
        self._by_number[made.number] = made
        return made

    def unnamed(self, sites: Rows[Site], batch: int) -> Sequence:
        """A new, empty sequence that no ghost names: whoever asks for it holds it."""
        return Sequence(next(self._numbers), Home().make(sites, batch, 0, CPU))

    def release_orphans(self, spared: Sequence | None = None) -> None:
        """Drop sequences that no live ghost stands for: copies of their ghosts are no longer recognised.

        While copies are being used (`spared` is the one copied from), the newest orphan stays as well.
        """
        orphans = [
            number for number, sequence in self._by_number.items() if not sequence.live and sequence is not spared
        ]
        for number in orphans[: -1 if spared is not None else None]:
            del self._by_number[number]

    @property
    def nbytes(self) -> int:
        """Bytes of KV that all sequences hold."""
        mirrored = sum(mirror.sequence.nbytes for mirror in self.mirrors.values())
        return mirrored + sum(sequence.nbytes for sequence in self._by_number.values())

    def mint(
        self, sequence: Sequence, columns: int, device: torch.device, shown: Rows[int] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Ghosts (keys, values) per site of a cache of `columns` columns; site i shows the newest shown[i] (or all)."""
        made: dict[int, Tensor] = {}
        widths = shown if shown is not None else [columns] * len(sequence.full.sites)
        for places, template in sequence.templates(device):
            base = template.clone()
            own = [widths[place // 2] for place in places]
            self._register(base, places, sequence, columns, own)
            for place, one, width in zip(places, base.unbind(0), own, strict=True):
                made[place] = one.expand(-1, -1, width, -1)
        return [(made[2 * layer], made[2 * layer + 1]) for layer in range(len(sequence.full.sites))]

    def _register(self, base: Tensor, places: Rows[int], sequence: Sequence, columns: int, shown: Rows[int]) -> None:
        storage = base.untyped_storage()
        step = base.stride(0) * base.element_size()
        pointers = [storage.data_ptr() + i * step for i in range(len(places))]
        for pointer, place, width in zip(pointers, places, shown, strict=True):
            self._by_storage[pointer] = Minted(sequence, sequence.epoch, place, columns, width, pointers[0])
        sequence.cut.update(place for place, width in zip(places, shown, strict=True) if width < columns)
        sequence.live[pointers[0]] = columns
        weakref.finalize(storage, self._forget, pointers, weakref.ref(sequence)).atexit = False

    def _forget(self, pointers: list[int], held: weakref.ref[Sequence]) -> None:
        for pointer in pointers:
            self._by_storage.pop(pointer, None)
        sequence = held()
        if sequence is not None:
            sequence.live.pop(pointers[0], None)

    def place_of(self, tensor: Tensor) -> int | None:
        """Which cache tensor a ghost, or a copy of one, stands for (twice the layer, plus one for values)."""
        known = self._by_storage.get(tensor.data_ptr())
        if known is not None:
            return known.place
        names = ghosts.read(tensor)
        return names[0].place if names else None

    def find(self, past: Rows[Tensor], columns: int | None = None) -> tuple[Sequence, int] | None:
        """The sequence that a call's cache tensors [B, K, S, D] stand for, and how many columns it has there; None when
        they hold real data.

        `columns` is given where tensors do not show it (sliding layers). A cropped cache cuts the sequence, unless
        another live ghost still shows what would be cut: then, as for a copied or permuted cache, a fork is made.
        Raises GhostError for tensors that are neither ghosts nor data.
        """
        known = [minted for tensor in past if (minted := self._by_storage.get(tensor.data_ptr())) is not None]
        sequence = known[0].sequence if len(known) == len(past) else None
        if sequence is None or any(minted.sequence is not sequence for minted in known):
            return self._by_value(past, columns)
        if columns is None:
            lengths = {minted.total - minted.shown + x.shape[2] for minted, x in zip(known, past, strict=True)}
            if len(lengths) > 1:
                raise GhostError(f"cache tensors of different lengths ({sorted(lengths)})", HERE, REBUILD)
            [columns] = lengths
        if columns > min(minted.total for minted in known):
            raise GhostError("a cache that says it is longer than what was computed", f"column {columns}", REBUILD)
        batch = past[0].shape[0]
        if batch != len(sequence.rows) or (batch > 1 and not past[0].stride(0)):
            return self._by_value(past, columns)  # a view of some of the rows, or of one row for many
        if not sequence.still_holds(min(minted.epoch for minted in known), columns):
            raise GhostError(CROPPED, HERE, REBUILD)
        return self._continue(sequence, {minted.storage for minted in known}, columns), columns

    def _continue(self, sequence: Sequence, pointers: set[int], columns: int) -> Sequence:
        newest = max(sequence.live.values())
        if columns == newest and all(sequence.live[p] == newest for p in pointers):
            return sequence
        others = [shown for pointer, shown in sequence.live.items() if pointer not in pointers]
        if any(shown > columns for shown in others):
            return self._fork(sequence, range(len(sequence.rows)), columns)
        sequence.truncate(columns)
        return sequence

    def _by_value(self, past: Rows[Tensor], columns: int | None) -> tuple[Sequence, int] | None:
        spelled = [names for tensor in past if (names := ghosts.read(tensor)) is not None]
        if not spelled and not any(map(ghosts.is_hollow, past)):
            return None
        if len(spelled) < len(past):
            fix = f"the cache was changed by arithmetic, cast to another type, or holds no data; {REBUILD}"
            raise GhostError("NaN where cached keys or values should be", HERE, fix)
        names = spelled[0]
        if any(_history(other) != _history(names) for other in spelled):
            raise GhostError("a cache whose layers come from different sequences", HERE, REBUILD)
        numbers = sorted({name.sequence for name in names})
        if len(numbers) > 1:
            raise GhostError(f"a cache whose rows come from different sequences ({numbers})", HERE, REBUILD)
        held = self._by_number.get(numbers[0])
        if held is None:
            raise GhostError(f"a copy of a cache that is no longer held (sequence {numbers[0]})", HERE, REBUILD)
        if columns is None:
            columns = self._columns_shown(held, past, [names[0].place for names in spelled])
        if not held.still_holds(min(name.epoch for name in names), columns):
            raise GhostError(CROPPED, HERE, REBUILD)
        return self._fork(held, [name.row for name in names], columns), columns

    def _columns_shown(self, sequence: Sequence, past: Rows[Tensor], places: Rows[int]) -> int:
        """How many columns copied tensors stand for, by those of layers that show all."""
        shown = {x.shape[2] for x, place in zip(past, places, strict=True) if place not in sequence.cut}
        if not shown:
            fix = f"call the model once with the cache that it was copied from, then copy; {REBUILD}"
            raise GhostError("a copied cache of sliding layers that does not say how long it is", HERE, fix)
        if len(shown) > 1:
            raise GhostError("cache tensors of different lengths", HERE, REBUILD)
        return shown.pop()

    def _fork(self, sequence: Sequence, rows: Rows[int], columns: int) -> Sequence:
        if any(sequence.rows[r].length < columns for r in rows):
            raise GhostError("a cache longer than what was computed for it", f"column {columns}", REBUILD)
        made = sequence.fork(next(self._numbers), list(rows), columns)
        self.release_orphans(spared=sequence)
        self._by_number[made.number] = made
        return made
