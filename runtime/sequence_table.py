"""All sequences of one model, and how a caller's tensors find theirs again."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vericache_compile.errors import GhostError
from vericache_compile.plan import Arrangement, CapturedPlan, Site
from vericache_compile.runtime import ghosts
from vericache_compile.runtime.caches import FullKV
from vericache_compile.runtime.ring import Ring
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.tiers import Home, Taken

if TYPE_CHECKING:
    from vericache_compile.runtime.mirrors import Mirror

ArrangeFork = Callable[[Sequence, int, int], Arrangement | None]
"""(sequence, rows, columns) -> how a copy of so many of its rows, so long, is decoded; None: as it is itself."""
CPU = torch.device("cpu")
REBUILD = "run the prompt again, or keep the cache that it was copied from alive and uncropped while copies are in use"
CROPPED = "an older state of a cache that was cropped below it since then"
HERE = "the cache of this call"


def _history(names: list[ghosts.Name]) -> list[tuple[int, int, int]]:
    """What all cache tensors of one call must agree on."""
    return [(name.sequence, name.epoch, name.row) for name in names]


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
        self.captured = False
        """Whether a graph has been captured since the last look at what is garbage."""
        self.rings: weakref.WeakSet[Ring] = weakref.WeakSet()
        """Of all sessions."""
        self.mirrors: dict[int, Mirror] = {}
        """Sequences that copy a caller's buffers, by data pointer of the first buffer."""

    def create(
        self, sites: Rows[Site], batch: int, columns: int = 0, device: torch.device = CPU, home: Home | None = None
    ) -> Sequence:
        """A new, empty sequence for `columns` columns, whose full KV lives at `home` (on the device where not given).

        Sequences without live ghosts are released first.
        """
        self.release_orphans()
        home = home or Home()
        arranged = home.arrange(batch, columns, device, self.taken())
        made = Sequence(next(self._numbers), home.make(sites, batch, arranged.way), arranged)
        self._by_number[made.number] = made
        return made

    def collect_captured(self) -> None:
        """Release sequences that only Dynamo held: the caches that it captured graphs with lie in cycles, which no one
        might collect for long."""
        if self.captured and self._by_number:
            self.captured = False
            gc.collect()
            self.release_orphans()

    @property
    def all_resident(self) -> bool:
        """Whether full KV of all sequences lies on the device, so that no ring is needed."""
        return all(each.full.resident for each in self._by_number.values())

    def taken(self, spared: Sequence | None = None) -> Taken:
        """What is taken of device memory beside a sequence."""
        held = [*self._by_number.values(), *(mirror.sequence for mirror in self.mirrors.values())]
        others = [each for each in held if each is not spared]
        return Taken(
            sum(each.on_device for each in others),
            sum(each.promised for each in others),
            sum(ring.nbytes for ring in self.rings),
            0 if spared is None else spared.on_device,
        )

    def unnamed(self, sites: Rows[Site], batch: int) -> Sequence:
        """A new, empty sequence that no ghost names: whoever asks for it holds it."""
        return Sequence(next(self._numbers), FullKV(sites, batch))

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
        """Bytes of KV that all sequences hold; what forks share counts once."""
        held = [*self._by_number.values(), *(mirror.sequence for mirror in self.mirrors.values())]
        full: dict[int, int] = {}
        for sequence in held:
            full |= sequence.full.parts()
        return sum(full.values()) + sum(sequence.beside for sequence in held)

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
        sequence.minted = max(sequence.minted, columns)
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

    def find(
        self, past: Rows[Tensor], columns: int | None = None, arrange: ArrangeFork | None = None
    ) -> tuple[Sequence, int] | None:
        """The sequence that a call's cache tensors [B, K, S, D] stand for, and how many columns it has there; None when
        they hold real data.

        `columns` is given where tensors do not show it (sliding layers). A cropped cache cuts the sequence, unless
        another live ghost still shows what would be cut: then, as for a copied or permuted cache, a fork is made, and
        decoded as `arrange` says.
        Raises GhostError for tensors that are neither ghosts nor data.
        """
        known = [minted for tensor in past if (minted := self._by_storage.get(tensor.data_ptr())) is not None]
        sequence = known[0].sequence if len(known) == len(past) else None
        if sequence is None or any(minted.sequence is not sequence for minted in known):
            return self._by_value(past, columns, arrange)
        if columns is None:
            lengths = {minted.total - minted.shown + x.shape[2] for minted, x in zip(known, past, strict=True)}
            if len(lengths) > 1:
                raise GhostError(f"cache tensors of different lengths ({sorted(lengths)})", HERE, REBUILD)
            [columns] = lengths
        if columns > min(minted.total for minted in known):
            raise GhostError("a cache that says it is longer than what was computed", f"column {columns}", REBUILD)
        batch = past[0].shape[0]
        if batch != len(sequence.rows) or (batch > 1 and not past[0].stride(0)):
            return self._by_value(past, columns, arrange)  # a view of some of the rows, or of one row for many
        if not sequence.still_holds(min(minted.epoch for minted in known), columns):
            raise GhostError(CROPPED, HERE, REBUILD)
        return self._continue(sequence, {minted.storage for minted in known}, columns, arrange), columns

    def _continue(self, sequence: Sequence, pointers: set[int], columns: int, arrange: ArrangeFork | None) -> Sequence:
        newest = max(sequence.live.values())
        if columns == newest and all(sequence.live[p] == newest for p in pointers):
            if columns < sequence.minted:  # what goes further was dropped, though there may be copies of it
                sequence.truncate(columns)
            return sequence
        others = [shown for pointer, shown in sequence.live.items() if pointer not in pointers]
        if any(shown > columns for shown in others):
            return self._fork(sequence, range(len(sequence.rows)), columns, arrange)
        sequence.truncate(columns)
        return sequence

    def _by_value(
        self, past: Rows[Tensor], columns: int | None, arrange: ArrangeFork | None
    ) -> tuple[Sequence, int] | None:
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
        return self._fork(held, [name.row for name in names], columns, arrange), columns

    def _columns_shown(self, sequence: Sequence, past: Rows[Tensor], places: Rows[int]) -> int:
        """How many columns copied tensors stand for, by those of layers that show all."""
        shown = {x.shape[2] for x, place in zip(past, places, strict=True) if place not in sequence.cut}
        if not shown:
            fix = f"call the model once with the cache that it was copied from, then copy; {REBUILD}"
            raise GhostError("a copied cache of sliding layers that does not say how long it is", HERE, fix)
        if len(shown) > 1:
            raise GhostError("cache tensors of different lengths", HERE, REBUILD)
        return shown.pop()

    def _fork(self, sequence: Sequence, rows: Rows[int], columns: int, arrange: ArrangeFork | None) -> Sequence:
        if any(sequence.rows[r].length < columns for r in rows):
            raise GhostError("a cache longer than what was computed for it", f"column {columns}", REBUILD)
        self.release_orphans(spared=sequence)
        arranged = arrange(sequence, len(rows), columns) if arrange is not None else None
        made = sequence.fork(next(self._numbers), list(rows), columns)
        made.arranged = arranged or made.arranged
        self._by_number[made.number] = made
        return made


def copy_in(sequence: Sequence, plan: CapturedPlan, inputs: Rows[Any], columns: int) -> None:
    """Fill a new sequence with the first `columns` columns of a call's cache tensors [B, K, C, D], which hold data."""
    batch = len(sequence.rows)
    sequence.full.reserve(columns + 1, inputs[plan.roles.tokens].device)
    for site in plan.sites:
        assert site.past is not None, "a graph that attends to a cache at some sites only"
        keys, values = site.attended(*(inputs[i][:, :, :columns] for i in site.past))
        sequence.full.append(site.layer, keys, values, [columns - keys.shape[2]] * batch)
        sequence.full.settle(site.layer, [columns] * batch)
    for row in sequence.rows:
        row.length = columns
