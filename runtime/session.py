"""A session: one model under one configuration. Runs captured graphs, serves rows, keeps counts."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.facts import KINDS
from vericache_compile.errors import GhostError, PageLost
from vericache_compile.plan import CapturedPlan, DecodePlan, Output, Roles, Site, Tier, Way
from vericache_compile.runtime import drafting, pieces, rounds
from vericache_compile.runtime.compression import Early
from vericache_compile.runtime.counts import Counts
from vericache_compile.runtime.drawn import Drawn
from vericache_compile.runtime.executor import WeightCasts, bind_weights
from vericache_compile.runtime.housing import Housing
from vericache_compile.runtime.mirrors import find_mirror, has_versions, paddings, write_back
from vericache_compile.runtime.outputs import assemble, take
from vericache_compile.runtime.pace import Pace
from vericache_compile.runtime.recovery import Call, record, recover, version_of
from vericache_compile.runtime.ring import Ring
from vericache_compile.runtime.rotations import Rotations
from vericache_compile.runtime.sequence_table import SequenceTable, copy_in
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.sliding import columns_of, columns_shown, is_short
from vericache_compile.runtime.store import Store
from vericache_compile.runtime.tiers import Home, PagedKV
from vericache_compile.runtime.timeline import Timeline
from vericache_compile.runtime.token_record import Judged, TokenRecord
from vericache_compile.runtime.told import Telling

log = logging.getLogger(__name__)
PAD = "pad on the left (tokenizer.padding_side = 'left')"


@dataclass(frozen=True)
class Footprint:
    """KV bytes of the sequence that ran last."""

    full: int = 0
    """Wherever it lives."""
    resident: int = 0
    """What of it lies in device memory for good."""
    staging: int = 0
    """The ring that the rest comes to."""
    draft: int = 0
    apart: int = 0
    """Copies in host memory of what regions leave out."""
    tokens: int = 0
    """Tokens held, over all rows."""


class Session:
    """Runs the graphs of one model under one configuration; safe to call from several threads."""

    def __init__(
        self,
        table: SequenceTable,
        compressor: Compressor,
        casts: WeightCasts,
        lock: threading.RLock,
        home: Home | None = None,
        ring: Ring | None = None,
    ) -> None:
        self.table = table
        self.compressor = compressor
        self.housing = Housing(table, home or Home(), ring or Ring())
        self.table.rings.add(self.housing.ring)
        self.counts = Counts()
        self.casts = casts
        self.prefill_seconds = 0.0
        self.last: tuple[DecodePlan, list[Any]] | None = None
        """The last decode plan with its weights (other inputs are None), for `draft_alone`."""
        self.footprint = Footprint()
        self.placement = self.way = ""
        """Where the full KV of the sequence that ran last lives, and how it is decoded."""
        self._newest: weakref.ref[Sequence] | None = None
        self._pace = Pace()
        """Of the sequence that ran last."""
        self._timelines: dict[str, Timeline] = {}
        self._timeline: Timeline | None = None
        self._records: dict[str, TokenRecord] = {}
        self._record: TokenRecord | None = None
        self._told_whole = False
        self._said: set[str] = set()
        self._lock = lock
        self._rotations = Rotations()
        self._recordings = pieces.Recordings()

    def write_to(self, trace: str | None, tokens: str | None) -> None:
        """Write calls and rounds down in one file, and their tokens in another, from now on; or nowhere."""
        if trace is not None and trace not in self._timelines:
            self._timelines[trace] = Timeline(trace)
        if tokens is not None and tokens not in self._records:
            self._records[tokens] = TokenRecord(tokens)
        self._timeline = None if trace is None else self._timelines[trace]
        self._record = None if tokens is None else self._records[tokens]

    def run(self, plan: CapturedPlan | DecodePlan, inputs: Rows[Any]) -> list[Any]:
        """One call of a captured graph, by its plan."""
        with self._lock:
            began, rounds_before = time.perf_counter(), self.counts.rounds
            made = self.run_decode(plan, inputs) if isinstance(plan, DecodePlan) else self.run_captured(plan, inputs)
            if self._timeline is not None:
                ran = [self.counts.latest[-1]] if self.counts.rounds > rounds_before else []
                what = "decode" if isinstance(plan, DecodePlan) else "prefill, or as captured"
                self._timeline.call(what, began, time.perf_counter() - began, ran, self.counts.spans if ran else ())
            return made

    def run_captured(self, plan: CapturedPlan, inputs: Rows[Any]) -> list[Any]:
        """Run a prefill, a second turn, or any call that no round can serve: as captured, on real KV."""
        with self._lock, torch.no_grad():
            if plan.in_place:
                if plan.roles.tokens_per_call == 1:
                    fix = "give a whole mask four axes, [B, 1, 1, C]; a padding mask, a column per token so far"
                    self._say_as_captured("a mask of two axes and of one size, over buffers", "the mask", fix)
                self._note_fed(plan, inputs, None, None)
                return list(plan.module(*inputs))
            sequence, columns = self._sequence(plan, inputs) if plan.attends_to_past else (None, 0)
            return self._run_captured(plan, inputs, sequence, columns)

    def _run_captured(
        self, plan: CapturedPlan, inputs: Rows[Any], sequence: Sequence | None, columns: int
    ) -> list[Any]:
        began, roles = time.perf_counter(), plan.roles
        batch, count = inputs[roles.tokens].shape
        device = inputs[roles.tokens].device
        if sequence is None:
            sequence = self._begin(plan.sites, batch, count, device)
        else:
            for row in sequence.rows:
                row.truncate(columns)
        self._note_fed(plan, inputs, sequence.number, columns)
        self.housing.grow(sequence, columns + count + 1, device)
        sequence.repeated = sequence.repeated and sequence.repeated.cut([columns] * batch)
        # the next token's too: after whole blocks it would copy all
        self.housing.reserve(sequence, columns + count + 1, device)
        pads = self._padding(sequence, roles, inputs)
        draft, starts = sequence.draft, [columns] * batch
        if draft is not None and (not draft.valid(starts) or draft.pads != pads or draft.room(starts) < count):
            sequence.draft = None
        if "attention" not in self.compressor.wants or sequence.arranged.way is Way.OFF:
            sequence.drawn = None
        elif columns == 0:
            sequence.drawn = Drawn.empty(plan.sites, batch, device)
        early = not columns and not sequence.full.resident and not self.compressor.wants & KINDS
        compresses = early and all(site.alibi is None for site in plan.sites)
        apart = sequence.sets_apart(self.compressor, count, plan.staging)
        sequence.early = Early(self.compressor, pads, apart) if compresses else None
        shown = columns_shown(plan, inputs)
        is_padded = any(pads) or not sequence.regular
        module = plan.module if is_padded or plan.unpadded is None else plan.unpadded
        try:
            made = module(Store(sequence, columns, self.compressor.queries, pads, shown), *inputs)
        except PageLost as lost:
            self._recover(sequence, lost)
            made = module(Store(sequence, columns, self.compressor.queries, pads, shown), *inputs)
        sequence.asked = None  # added with this call's
        if sequence.full.tier is Tier.DISK:
            record(sequence, plan, module, inputs, columns, count)
        for row, pad in zip(sequence.rows, pads, strict=True):
            row.length, row.pad = columns + count, pad
        if self.compressor.wants & {"repeated", "ids"} or sequence.full.tier is Tier.DISK:
            _note_tokens(sequence, inputs[roles.tokens], columns)
        self._note(sequence)
        self.prefill_seconds += time.perf_counter() - began
        return assemble(self.table, plan, list(made), sequence, inputs, columns + count, marked=True)

    def run_decode(self, plan: DecodePlan, inputs: Rows[Any]) -> list[Any]:
        """One decode call: serve held rows, after a round where a row of the batch has none."""
        with self._lock, torch.no_grad():
            roles = plan.captured.roles
            if plan.captured.in_place:
                return self._run_in_place(plan, inputs)
            sequence, columns = self._sequence(plan.captured, inputs)
            fed = self._fed(plan, inputs, self._padding(sequence, roles, inputs), columns)
            if fed is None or not sequence.regular or is_short(plan.captured, inputs, columns):
                return self._run_captured(plan.captured, inputs, sequence, columns)
            made = self._rows(plan, inputs, sequence, fed, columns, moves=True)
            return assemble(self.table, plan.captured, made, sequence, inputs, columns + 1, marked=False)

    def _rows(
        self,
        plan: DecodePlan,
        inputs: Rows[Any],
        sequence: Sequence,
        fed: list[tuple[int, int, int]],
        columns: int,
        *,
        moves: bool = False,
    ) -> list[Tensor]:
        """The row outputs of a decode call, after a round where a row of the batch has none held; full KV that `moves`
        may go to host memory before it."""
        version = version_of(inputs, plan.captured.roles.weights)
        changed = version != sequence.version
        if changed and sequence.version:
            sequence.calls.clear()  # nothing gives back what other weights made
        elif sequence.calls and columns > sequence.calls_end:
            places = [(row.offset, row.pad) for row in sequence.rows]
            if places != [(offset, pad) for _, offset, pad in fed]:
                sequence.calls.clear()  # nor what rounds made at other positions
        for row, (token, offset, pad) in zip(sequence.rows, fed, strict=True):
            if changed:
                row.truncate(columns)  # what was computed ahead is the old weights'
            row.feed(columns, token, offset, pad)
        sequence.version = version
        if any(not row.held for row in sequence.rows):
            for row, (token, *_) in zip(sequence.rows, fed, strict=True) if plan.in_step else ():
                row.truncate(columns)
                row.token = token
            own = set(plan.captured.roles.weights)  # those of this call: a model's parameters may have been replaced
            sequence.decode = self.last = (plan, [x if i in own else None for i, x in enumerate(inputs)])
            if moves:
                longest = max(row.length for row in sequence.rows)
                self.housing.grow(sequence, longest + plan.window, inputs[plan.captured.roles.tokens].device)
            judged = self._run_round(sequence)
            if self._record is not None:
                self._record.round(sequence.number, judged)
            self._tell_whole(sequence)
            self._note(sequence)
        self.counts.served += len(sequence.rows)
        return take(sequence.rows)

    def _run_in_place(self, plan: DecodePlan, inputs: Rows[Any]) -> list[Any]:
        """A decode call over the caller's own buffers, which get what it appends."""
        captured = plan.captured
        counted = torch.stack([inputs[i].flatten() for i in captured.roles.counters]).flatten().tolist()
        columns, shown = int(counted[0]), captured.roles.shown
        batch = inputs[captured.roles.tokens].shape[0]
        pads: list[int] | None = [0] * batch
        if shown is not None:
            pads = paddings(inputs[shown], columns, batch)
        elif captured.roles.mask is not None:
            pads = paddings(inputs[captured.roles.mask][:, None, None] != 0, columns, batch)
        if pads is None:
            self._say_as_captured("a mask that is not causal with left padding", "the mask", PAD)
        if not (counts := has_versions(captured, inputs)):
            fix = "make the buffers outside of torch.inference_mode()"
            self._say_as_captured("buffers whose changes are not counted", "the cache", fix)
        fed = self._fed(plan, inputs, pads, columns) if pads is not None and len(set(counted)) == 1 else None
        if fed is None or not counts:
            self._note_fed(captured, inputs, None, columns)
            return list(captured.module(*inputs))
        mirror = find_mirror(self.table, captured, inputs, columns)
        if mirror.sequence.decode is None:
            mirror.sequence.pace = self._pace.following()
        made = iter(self._rows(plan, inputs, mirror.sequence, fed, columns))
        write_back(mirror, captured, inputs, columns)
        self._note(mirror.sequence)
        past = [site.past or () for site in captured.sites]
        side = {Output.KEYS: 0, Output.VALUES: 1}
        return [inputs[past[r.layer][side[r.kind]]] if r.kind in side else next(made) for r in captured.outputs]

    def _run_round(self, sequence: Sequence, known: Tensor | None = None, counts: Counts | None = None) -> list[Judged]:
        """A round of a sequence that is being decoded; where a page of its full KV is lost, after that came back."""
        assert sequence.decode is not None, "set by the decode call"
        plan, inputs = sequence.decode
        device = inputs[plan.captured.roles.weights[0]].device
        if pieces.serves(device, plan, len(sequence.rows)):
            plan = self._recordings.of(plan, device, bind_weights(plan.verify, inputs, self.casts))
        arguments = (
            plan,
            inputs,
            self.compressor,
            counts or self.counts,
            self.casts,
            self._rotations,
            self.housing.ring,
            known,
        )
        try:
            return rounds.run_round(sequence, *arguments)
        except PageLost as lost:
            self._recover(sequence, lost)
            return rounds.run_round(sequence, *arguments)

    def _begin(self, sites: Rows[Site], batch: int, columns: int, device: torch.device) -> Sequence:
        """A new sequence, which drafts as what was seen of the one that ran last lets expect."""
        sequence = self.housing.begin(sites, batch, columns, device)
        self._pace = sequence.pace = self._pace.following()
        return sequence

    def _recover(self, sequence: Sequence, lost: PageLost) -> None:
        """Compute the sequence's full KV again, into host memory; raises `lost` where that cannot be done."""
        full = sequence.full
        assert isinstance(full, PagedKV), "pages are lost from files only"
        batch = len(sequence.calls[0].before) if sequence.calls else full.batch
        replica = Sequence(-1, PagedKV(full.sites, batch, Tier.HOST, None, full.link), sequence.arranged)
        replica.full.reserve(full.columns, full.device)
        replica.decode = sequence.decode

        def run_call(replica: Sequence, call: Call) -> None:
            replica.draft = None  # its tail need not have room for the call
            pads, shown = [row.pad for row in replica.rows], columns_shown(call.plan, call.inputs)
            call.module(Store(replica, call.column, 0, pads, shown), *call.given)

        def verify(replica: Sequence, tokens: Tensor) -> None:
            self._run_round(replica, tokens, Counts())

        recover(sequence, lost, replica, run_call, verify)

    def _tell_whole(self, sequence: Sequence) -> None:
        """Say once that a compressor is not used at sites that need to know where kept tokens stood."""
        if sequence.draft is not None and sequence.draft.whole and not self._told_whole:
            self._told_whole = True
            log.warning(
                "vericache: drafts read every token of layers with ALiBi: a compressed cache does not say where in the "
                "text its tokens stood\n  where: compressor %s\n  fix: use one that keeps all in order (int8, kivi)",
                self.compressor,
            )

    def _fed(
        self, plan: DecodePlan, inputs: Rows[Any], pads: list[int], columns: int
    ) -> list[tuple[int, int, int]] | None:
        """Per row (token, offset, pad) of a decode call; None where only the captured graph gives plain's answer."""
        roles = plan.captured.roles
        tokens = inputs[roles.tokens].flatten().tolist()
        if roles.positions is not None:
            given = inputs[roles.positions].flatten().tolist()
            offsets = [position - columns for position in (given * len(tokens) if len(given) == 1 else given)]
        elif plan.position_rule == "unpadded":
            offsets = [-pad for pad in pads]
        else:
            offsets = [0] * len(tokens)
        if plan.column_limit is not None and columns >= plan.column_limit:
            return None
        limit = plan.position_limit
        if limit is not None and any(columns + offset >= limit for offset in offsets):
            return None
        return list(zip(tokens, offsets, pads, strict=True))

    @property
    def newest(self) -> Sequence | None:
        """The sequence that ran last, while it is held."""
        return self._newest() if self._newest is not None else None

    def _note_fed(self, plan: CapturedPlan, inputs: Rows[Any], sequence: int | None, column: int | None) -> None:
        """Write down the tokens of a call that runs as captured, for whoever asked for tokens."""
        if self._record is not None:
            self._record.fed(sequence, column, inputs[plan.roles.tokens].tolist())

    def _note(self, sequence: Sequence) -> None:
        full, draft = sequence.full, sequence.draft.nbytes if sequence.draft is not None else 0
        tokens = sum(row.length - row.pad for row in sequence.rows)
        held = (full.nbytes, full.nbytes * full.resident, self.housing.ring.nbytes, draft, sequence.apart)
        self.footprint = Footprint(*held, tokens)
        self.placement, self.way = str(full.tier), str(sequence.arranged.way)
        self._newest, self._pace = weakref.ref(sequence), sequence.pace

    def _say_as_captured(self, found: str, where: str, fix: str) -> None:
        """Say once why no round serves a cache."""
        if found not in self._said:
            self._said.add(found)
            log.warning(
                "vericache: no rounds for this cache, each step runs as captured: %s\n  where: %s of this call\n"
                "  fix: %s",
                found,
                where,
                fix,
            )

    def _sequence(self, plan: CapturedPlan, inputs: Rows[Any]) -> tuple[Sequence, int]:
        past = [inputs[i] for site in plan.sites if site.past is not None for i in site.past]
        columns = columns_of(plan, inputs)
        return self.table.find(past, columns, self.housing.arrange_fork) or self._adopt(plan, inputs, columns)

    def _adopt(self, plan: CapturedPlan, inputs: Rows[Any], columns: int | None) -> tuple[Sequence, int]:
        """A sequence over a copy of real cached data (a cache that an uncompiled model built), and its columns."""
        if columns is None:
            found = "a cache of sliding layers, built outside, that does not say how many columns it stands for"
            raise GhostError(found, "the cache of this call", "run the prompt through the compiled model")
        tokens = inputs[plan.roles.tokens]
        sequence = self._begin(plan.sites, tokens.shape[0], columns, tokens.device)
        copy_in(sequence, plan, inputs, columns)
        return sequence, columns

    def _padding(self, sequence: Sequence, roles: Roles, inputs: Rows[Any]) -> list[int]:
        """Left padding per row from the caller's mask [B, columns]; notes whether the mask is of that form."""
        if roles.mask is None:
            sequence.regular = True
            return [0] * len(sequence.rows)
        shown = inputs[roles.mask] != 0
        pads: list[int] = (shown.shape[1] - shown.sum(-1)).tolist()
        sequence.regular = not any(pads) or all(bool(shown[b, pad:].all()) for b, pad in enumerate(pads))
        if not sequence.regular:
            self._say_as_captured("a padding mask with holes or padding on the right", "the attention_mask", PAD)
        return pads if sequence.regular else [0] * len(pads)

    def with_data(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs for a graph that is not taken: ghosts become real KV."""
        places = {i: place for i, x in enumerate(inputs) if (place := self._place(x)) is not None}
        return self._materialize(inputs, places) if places else inputs

    def is_ghost(self, value: Any) -> bool:
        """Whether an input is a cache tensor without data."""
        return self._place(value) is not None

    def _place(self, value: Any) -> int | None:
        return self.table.place_of(value) if isinstance(value, Tensor) and value.dim() == 4 else None

    def _materialize(self, inputs: tuple[Any, ...], places: dict[int, int]) -> tuple[Any, ...]:
        with self._lock, torch.no_grad():
            ghosts = [inputs[i] for i in places]
            found = self.table.find(ghosts)
            assert found is not None, "a ghost was recognised and then was not"
            (sequence, columns), real = found, list(inputs)
            for i, place in places.items():
                span = (place // 2, columns - inputs[i].shape[2], columns)
                try:
                    held = sequence.full.read(*span)
                except PageLost as lost:
                    self._recover(sequence, lost)
                    held = sequence.full.read(*span)
                shown = sequence.full.sites[place // 2].cached(*held)
                real[i] = shown[place % 2].clone(memory_format=torch.contiguous_format)
            return tuple(real)

    def draft_alone(self, sequence: Sequence, first: list[int], count: int) -> list[list[int]]:
        """Tokens [B][count] that the compressed cache alone would give after `first`: a measurement, touches no row."""
        assert self.last is not None, "no decode step has run yet"
        plan, inputs = self.last
        with self._lock, torch.no_grad():
            device = next(x for x in inputs if x is not None).device
            copy = sequence.fork(-1, range(len(sequence.rows)), min(row.length for row in sequence.rows))
            for row, token in zip(copy.rows, first, strict=True):
                row.token = token
                row.offset = 0 if plan.position_rule == "column" else -row.pad
            start = drafting.make_start(copy, device)
            telling = Telling(copy, plan, inputs, self._rotations, self.compressor)
            draft = drafting.prepare_draft(copy, start, self.compressor, count, Counts(), telling)
            bound = bind_weights(plan.draft, inputs, self.casts)
            return drafting.draft_tokens(copy, draft, plan, bound, start, count)[:, 1:].tolist()


def _note_tokens(sequence: Sequence, tokens: Tensor, columns: int) -> None:
    """Note the tokens [B, T] at `columns` on, for rows whose tokens before are known."""
    for row, ids in zip(sequence.rows, tokens.tolist(), strict=True):
        if len(row.ids) >= columns:
            row.ids[columns:] = ids
