"""Drafting: where a round starts, its draft cache, and greedy tokens one by one over it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.facts import KINDS
from vericache_compile.plan import DecodePlan, Way
from vericache_compile.runtime import draft_step
from vericache_compile.runtime.acceptance import next_horizon
from vericache_compile.runtime.attention import Visible, attend_compressed
from vericache_compile.runtime.caches import DraftKV, whole_types
from vericache_compile.runtime.compression import CHUNK, compress, extend
from vericache_compile.runtime.counts import Counts
from vericache_compile.runtime.executor import Attend, execute
from vericache_compile.runtime.incoming import Incoming
from vericache_compile.runtime.scores import scores_of
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.told import Telling


@dataclass(frozen=True)
class Start:
    """Where a round starts, per row."""

    columns: list[int]
    pads: list[int]
    tokens: Tensor
    """[B, 1] int64."""
    positions: Tensor
    """[B, 1] int64."""
    bounds: Tensor
    """Columns and pads on the device, [2, B] int64."""

    def positions_at(self, steps: int, limit: int | None) -> Tensor:
        """Positions after `steps` tokens; past the model's limit they are clamped, and their rows never handed out."""
        moved = self.positions + steps
        return moved if limit is None else moved.clamp_(max=limit - 1)


def make_start(sequence: Sequence, device: torch.device) -> Start:
    """Each row starts at its own frontier with its own next token."""
    columns, pads = [row.length for row in sequence.rows], [row.pad for row in sequence.rows]
    tokens = [row.token or 0 for row in sequence.rows]
    positions = [row.length + row.offset for row in sequence.rows]
    held = torch.tensor([tokens, positions, columns, pads], device=device)
    return Start(columns, pads, held[0, :, None], held[1, :, None], held[2:])


def usable_draft(
    draft: DraftKV | None, start: Start, compressor: Compressor, plan: DecodePlan, counts: Counts, drafts: bool
) -> DraftKV | None:
    """A draft cache as far as it can still be used: not another compressor's, of other windows or paddings, cut into,
    or, where the round drafts, due to be refreshed."""
    if draft is None or draft.compressor is not compressor or draft.reaches != reaches_of(plan):
        return None
    if not draft.valid(start.columns) or draft.pads != start.pads:
        return None
    if drafts and 0 < compressor.refresh <= draft.age(start.columns):
        counts.refreshes += 1
        return None
    return draft


def reaches_of(plan: DecodePlan) -> list[int | None]:
    """Per site the columns that a token attends to; None for all."""
    return [site.window for site in plan.captured.sites]


def prepare_draft(
    sequence: Sequence, start: Start, compressor: Compressor, window: int, counts: Counts, telling: Telling
) -> DraftKV:
    """The sequence's draft cache with room for a window: made where there is none, else tails are compressed in."""
    began = time.perf_counter()
    draft = sequence.draft
    if draft is None or draft.room(start.columns) < window:
        queries = [sequence.asked_within(layer, start.pads, start.columns) for layer in range(len(sequence.queries))]
        spread = max(start.columns) - min(start.columns)
        room = CHUNK + 2 * window + spread
        tell = telling.of if compressor.wants & KINDS else None
        full, plan = sequence.full, telling.plan
        placed = {site.layer for site in plan.captured.sites if site.alibi is not None}
        with whole_types(start.tokens.device):
            if draft is not None:
                sequence.draft = None  # until it is whole again
                extend(draft, full, start.pads, start.columns, queries, room, tell, placed)
            else:
                early, reaches = sequence.take_early(compressor, start.columns), reaches_of(plan)
                how = (room, early, tell, placed, reaches)
                apart = sequence.sets_apart(compressor, max(start.columns), plan.captured.staging)
                draft = compress(compressor, full, start.pads, start.columns, queries, *how, apart)
        sequence.draft, sequence.has_drafted = draft, True
        counts.compress_seconds += time.perf_counter() - began
    return draft


def next_steps(sequence: Sequence, window: int) -> int:
    """How many tokens to draft: as many as the caller has been taking, or none."""
    served, pace = max(row.served for row in sequence.rows), sequence.pace
    pace.count(sum(row.served for row in sequence.rows) / len(sequence.rows))
    longest = 0 if pace.resting or sequence.arranged.way is Way.OFF else window - 1
    first = min(longest, 1) if pace.failed else longest
    sequence.horizon = next_horizon(served, sequence.horizon, longest) if sequence.horizon else first
    for row in sequence.rows:
        row.served = 0
    return sequence.horizon


def draft_tokens(
    sequence: Sequence,
    draft: DraftKV,
    plan: DecodePlan,
    bound: list[Tensor | None],
    start: Start,
    horizon: int,
    coming: Incoming | None = None,
) -> Tensor:
    """Greedy tokens over the compressed cache: [B, 1 + horizon], the round's first token included.

    The first step asks for the full KV that is `coming`, as far ahead as it may. Rows whose caller feeds one token
    whatever is predicted (`forced`) repeat it.
    """
    forced = torch.tensor([[row.forced] for row in sequence.rows], device=start.tokens.device)
    if draft_step.serves(start.tokens.device, plan, draft):
        replayed = draft_step.step_of(draft, plan, bound, start.tokens.shape[0], horizon)
        return replayed.draft(start.tokens, start.positions, start.bounds[0], forced, horizon, coming)
    tokens = [start.tokens]
    repeats = any(row.forced for row in sequence.rows)
    for step in range(horizon):
        (token,) = execute(
            plan.draft,
            bound,
            tokens[-1],
            start.positions_at(step, plan.position_limit),
            _drafting(draft, plan, start, step),
            None if step else coming,
        )
        tokens.append(torch.where(forced, start.tokens, token) if repeats else token)
    return torch.cat(tokens, dim=1)


def _drafting(draft: DraftKV, plan: DecodePlan, start: Start, step: int) -> Attend:
    """Attention of one draft step: the new token goes to the tail, then over region and tail."""
    columns = [column + step for column in start.columns]
    grown = [column + 1 for column in columns]
    masks: dict[Visible, Tensor | None] = {}
    sites = plan.captured.sites

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        held = draft.layers[layer]
        held.write(k, v, columns)
        if held.attends and sites[layer].is_plain:
            return held.attend(grown, q, sites[layer].scale)
        keys, values, visible = held.read(grown, q)
        scores = scores_of(sites[layer], sinks, max(visible.rights), q.device)
        return attend_compressed(q, keys, values, visible, sites[layer].scale, masks, scores)

    return attend
