"""One round: draft H tokens over the compressed cache, verify W in one pass over the full cache, keep what stands.

The one host wait of a round is here, after verify.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from functools import cache

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.plan import DecodePlan
from vericache_compile.runtime.acceptance import accept
from vericache_compile.runtime.caches import DraftKV
from vericache_compile.runtime.clock import moment, seconds_between
from vericache_compile.runtime.counts import Counts, Round
from vericache_compile.runtime.drafting import (
    Start,
    draft_tokens,
    make_start,
    next_steps,
    prepare_draft,
    reaches_of,
    usable_draft,
)
from vericache_compile.runtime.drawn import Asked
from vericache_compile.runtime.executor import WeightCasts, bind_weights
from vericache_compile.runtime.incoming import Incoming, incoming
from vericache_compile.runtime.pace import Seen
from vericache_compile.runtime.repeat import repeat_once
from vericache_compile.runtime.ring import Ring
from vericache_compile.runtime.rotations import Rotations
from vericache_compile.runtime.sequences import Held, Row, Sequence, followed
from vericache_compile.runtime.token_record import Judged
from vericache_compile.runtime.told import Telling
from vericache_compile.runtime.verify import verify_tokens

log = logging.getLogger(__name__)


def run_round(
    sequence: Sequence,
    plan: DecodePlan,
    inputs: Rows[Tensor],
    compressor: Compressor,
    counts: Counts,
    casts: WeightCasts,
    rotations: Rotations,
    ring: Ring,
    known: Tensor | None = None,
) -> list[Judged]:
    """Draft, verify, accept and commit for every row of a sequence; rows already far ahead stay where they are.

    Full KV that lives outside the device comes in through `ring` meanwhile. Where there is no memory for a draft cache
    the round is one without drafts; an error leaves the sequence as it was. Where tokens [B, n] are `known` they stand
    for what would have been drafted. Returns what was made of each row.
    """
    device = inputs[plan.captured.roles.weights[0]].device
    before = (counts.compress_seconds, counts.drafted, counts.accepted)
    recalled = sequence.full.recalled
    called, made_before = time.perf_counter(), sequence.has_drafted
    paid = counts.compress_seconds + counts.repeat_seconds
    horizon = next_steps(sequence, plan.window)
    start = make_start(sequence, device)
    sequence.full.reserve(max(start.columns) + plan.window, device)
    verify = bind_weights(plan.verify, inputs, casts)
    sequence.draft = usable_draft(sequence.draft, start, compressor, plan, counts, bool(horizon))
    sequence.repeated = sequence.repeated and sequence.repeated.cut(start.columns)
    if horizon or sequence.draft is not None:  # a round without drafts needs none, but is not to leave gaps in one
        try:
            repeat_once(sequence, compressor, plan, verify, ring, counts, device)
            telling = Telling(sequence, plan, inputs, rotations, compressor)
            prepare_draft(sequence, start, compressor, plan.window, counts, telling)
        except torch.OutOfMemoryError:
            sequence.draft, sequence.horizon, horizon = None, 0, 0
            sequence.pace.rest()
            _say_no_room(device)
    draft = sequence.draft
    low = bind_weights(plan.draft, inputs, casts) if draft is not None else []
    where = (start.columns, start.pads, reaches_of(plan))
    comes = sequence.pace.bytes_while_drafting()
    coming = incoming(sequence.full, draft, ring, sequence.staging(plan.captured.staging), *where, comes)
    launched, began = time.perf_counter(), moment(device)
    try:
        if known is not None:
            drafted = known[:, : plan.window].to(device)
        elif draft is not None:
            drafted = draft_tokens(sequence, draft, plan, low, start, horizon, coming)
        else:
            drafted = start.tokens
        drafted_at = moment(device)
        keep, show = compressor.queries > 0, _late(sequence, start)
        outputs, queries = verify_window(coming, draft, plan, verify, start, drafted, keep, show)
        greedy = outputs[plan.logits][: drafted.shape[1], :, -1].argmax(-1).t()
        verified_at = moment(device)
        predicted = greedy.tolist()  # the round's host wait
    finally:
        coming.close()
    window = drafted.tolist()
    took = (seconds_between(began, drafted_at), seconds_between(drafted_at, verified_at))
    counts.draft_seconds += took[0]
    counts.verify_seconds += took[1]
    kept = _commit(sequence, plan, start, window, predicted, horizon, outputs, queries, compressor.queries, counts)
    for site in plan.captured.sites:
        sequence.full.settle(site.layer, [row.length for row in sequence.rows])
    now = (counts.compress_seconds, counts.drafted, counts.accepted)
    compressing, more, stood = (after - then for after, then in zip(now, before, strict=True))
    traffic, spans = coming.traffic()
    counts.add_transfers(traffic, spans)
    counts.recalled += sequence.full.recalled - recalled
    again = counts.compress_seconds + counts.repeat_seconds - paid if made_before else 0.0
    sequence.pace.note(Seen(horizon, *took, again, traffic.seconds, traffic.nbytes))
    counts.rested += not horizon
    made = Round(called, compressing, launched, *took, len(sequence.rows), int(more), int(stood), traffic)
    counts.latest.append(made)
    return [Judged(*each) for each in zip(start.columns, window, predicted, kept, strict=True)]


def verify_window(
    coming: Incoming,
    draft: DraftKV | None,
    plan: DecodePlan,
    bound: list[Tensor | None],
    start: Start,
    drafted: Tensor,
    keep: bool,
    show: Callable[[int, Tensor], None] | None = None,
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Verify always W rows per sequence, short drafts padded, so that shapes stay the same.

    Writes the window's keys and values to the full cache and, exact, to the draft's tail, where there is a draft cache,
    and shows each site's full keys. Returns the row outputs, each [W, B, ...], and, where they are to be kept, the
    window's queries per site [B, H, W, D].
    """
    batch, have = drafted.shape
    tokens = torch.zeros((plan.window, batch, 1), dtype=torch.int64, device=drafted.device)
    tokens[:have, :, 0] = drafted.t()
    queries: list[Tensor | None] = [None] * len(plan.captured.sites)

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> None:
        if draft is not None:
            draft.layers[layer].write(k, v, start.columns)
        if show is not None:
            show(layer, keys)
        if keep:
            queries[layer] = q.clone()  # a recording writes to the same place again

    return verify_tokens(coming, start.pads, plan, bound, tokens, start.positions, note, start.bounds, have), queries


def _commit(
    sequence: Sequence,
    plan: DecodePlan,
    start: Start,
    window: list[list[int]],
    predicted: list[list[int]],
    horizon: int,
    outputs: tuple[Tensor, ...],
    queries: list[Tensor | None],
    limit: int,
    counts: Counts,
) -> list[int]:
    """Keep each row's accepted rows; what was written beyond them lies past its length and is overwritten later.

    Of the window's queries the last `limit` accepted ones are kept. Returns how many rows were kept of each.
    """
    counts.rounds += 1
    counts.row_rounds += len(sequence.rows)
    standing = [_standing(row, plan, *own) for row, *own in zip(sequence.rows, window, predicted, strict=True)]
    made = [max(min(standing) if plan.in_step else own, 0) for own in standing]
    for b, row in enumerate(sequence.rows):
        if not (kept := made[b]):
            continue
        own = outputs if len(sequence.rows) == 1 else tuple(output[:kept, b : b + 1].clone() for output in outputs)
        if len(row.ids) == row.length:
            row.ids += window[b][:kept]
        row.held.extend(Held(row.length + i, window[b][i], own, i) for i in range(kept))
        row.length += kept
        row.token = window[b][0] if row.forced else predicted[b][kept - 1]
        counts.add_row(plan.window, horizon, kept - 1)
        for held, asked in zip(sequence.queries, queries, strict=True):
            if asked is not None:
                held[b] = followed(held[b], asked[b, :, :kept], start.columns[b], limit)
    if sequence.drawn is not None:
        made_of = Asked(start.columns, made, queries)
        sequence.asked = None if sequence.full.resident else made_of
        if sequence.full.resident:
            for layer, keys in enumerate(sequence.full.keys):
                sequence.drawn.add_window(layer, made_of, [row.length for row in sequence.rows], keys, start.pads)
    return made


def _standing(row: Row, plan: DecodePlan, window: list[int], predicted: list[int]) -> int:
    """How many rows of its window a row of the batch may keep; 0 or less where it takes no part in the round."""
    if len(row.held) >= plan.window or row.token is None:
        return 0
    kept = accept(window, predicted, row.forced)
    if plan.position_limit is not None:
        kept = min(kept, max(plan.position_limit - (row.length + row.offset), 1))
    return kept if plan.column_limit is None else min(kept, plan.column_limit - row.length)


@cache
def _say_no_room(device: torch.device) -> None:
    """Say once that there was no memory for drafts."""
    log.warning(
        "vericache: no device memory for a compressed cache: rounds go on without drafts, which are tried again later\n"
        "  where: %s\n  fix: free device memory, or choose a smaller keep or bits; rows are the same",
        device,
    )


def _late(sequence: Sequence, start: Start) -> Callable[[int, Tensor], None] | None:
    """Where full KV lives outside the device, what adds the last round's attention while keys are there again; once."""
    drawn, asked, sequence.asked = sequence.drawn, sequence.asked, None
    if drawn is None or asked is None:
        return None
    return lambda layer, keys: drawn.add_window(layer, asked, start.columns, keys, start.pads)
