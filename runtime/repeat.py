"""Lets the model repeat its context over the full cache, and notes which keys it needs for that (KVzip).

Kim et al., arXiv 2505.23416, section 3: the context, chunk by chunk, is fed once more behind itself; a key's score is
the most attention that it draws from these queries, each of which sees the sinks, its chunk, and what was repeated so
far. The paper precedes each chunk by an instruction and the last 8 tokens of the chunk before. There is no tokenizer
here, so the instruction is left out: the 8 tokens are what starts the repetition.

It runs on verify passes. What they write lies past every row's length, as a rejected draft does, and is overwritten;
the room for it is given back.

Shapes: B batch, H query heads, K KV heads, C columns, W window, S tokens of a chunk, D head size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.plan import DecodePlan
from vericache_compile.runtime.counts import Counts
from vericache_compile.runtime.drawn import Repeated
from vericache_compile.runtime.incoming import incoming
from vericache_compile.runtime.ring import Ring
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.verify import verify_tokens

log = logging.getLogger(__name__)
CHUNK = 2048
"""Tokens repeated in one go."""
LEAD = 8
"""Tokens of the chunk before, from which a repetition starts."""
SINKS = 4
"""First tokens: every query sees them, and they always stay."""


@dataclass(frozen=True)
class Passage:
    """What one row repeats in one go."""

    begin: int
    end: int
    """Its columns [begin, end)."""
    ids: list[int]
    """Tokens to feed, the lead included."""


def repeat_once(
    sequence: Sequence,
    compressor: Compressor,
    plan: DecodePlan,
    bound: list[Tensor | None],
    ring: Ring,
    counts: Counts,
    device: torch.device,
) -> None:
    """Let the model repeat its context before a draft cache is made, where a method wants that, the tokens of the
    context are known, and there are positions for them.

    What was repeated stays known, whatever comes later, until some of it is cut off or a refresh is due.
    """
    if "repeated" not in compressor.wants:
        sequence.repeated = None
        return
    lengths = [row.length for row in sequence.rows]
    if sequence.draft is None and not _is_known(sequence.repeated, lengths, compressor.refresh):
        began = time.perf_counter()
        repeats = knows_context(sequence) and has_positions(sequence, plan.position_limit)
        sequence.repeated = repeat_context(sequence, plan, bound, ring, device) if repeats else None
        counts.repeat_seconds += time.perf_counter() - began


def _is_known(repeated: Repeated | None, lengths: Rows[int], refresh: int) -> bool:
    """Whether what was repeated will do for rows of these lengths."""
    if repeated is None or not repeated.whole:
        return False
    later = max(length - then for length, then in zip(lengths, repeated.lengths, strict=True))
    return not 0 < refresh <= later


def knows_context(sequence: Sequence) -> bool:
    """Whether every row's tokens were seen."""
    return all(len(row.ids) == row.length for row in sequence.rows)


def has_positions(sequence: Sequence, limit: int | None) -> bool:
    """Whether a model of so many positions (None: as many as are wanted) has them for the repetition too; said once
    where it has not: beyond the last one all tokens would stand in one place, and what they attend to mean nothing."""
    rows = sequence.rows
    if limit is None or all(r.length + r.offset + columns_fed(r.length - r.pad) <= limit for r in rows):
        return True
    _tell_no_positions(limit, max(limit // 2, limit - LEAD - CHUNK))
    return False


@cache
def _tell_no_positions(limit: int, most: int) -> None:
    log.warning(
        "vericache: the context is not repeated, the last queries vote instead: there are no positions for it behind "
        "itself\n  where: a model of %d positions\n  fix: give it at most %d tokens, or choose a method that repeats "
        "nothing (adakv)",
        limit,
        most,
    )


def columns_fed(tokens: int) -> int:
    """Columns behind a context of so many tokens that its repetition takes for a while, at most."""
    return min(tokens, LEAD + CHUNK)


def repeat_context(
    sequence: Sequence, plan: DecodePlan, bound: list[Tensor | None], ring: Ring, device: torch.device
) -> Repeated:
    """Scores of every row's columns at every site; needs the tokens of all of them (`knows_context`)."""
    rows, room = sequence.rows, sequence.full.columns
    longest, width = max(row.length - row.pad for row in rows), max(row.length for row in rows)
    scores = [torch.zeros(len(rows), site.kv_heads, width, device=device) for site in plan.captured.sites]
    sequence.full.reserve(width + columns_fed(longest) + plan.window, device)
    try:
        for begin in range(0, longest, CHUNK):
            passages = [_passage(row.ids, row.pad, row.length, begin) for row in rows]
            for step in range(0, max(len(passage.ids) for passage in passages), plan.window):
                _repeat(sequence, plan, bound, ring, passages, step, scores, device)
    finally:
        sequence.full.give_back(room)
    for held in scores:
        for b, row in enumerate(rows):
            held[b, :, row.pad : row.pad + SINKS] = float("inf")
    return Repeated(scores, [row.length for row in rows])


def _passage(ids: list[int], pad: int, length: int, begin: int) -> Passage:
    first, last = min(pad + begin, length), min(pad + begin + CHUNK, length)
    return Passage(first, last, ids[max(first - LEAD, pad) : last] if last > first else [])


def _repeat(
    sequence: Sequence,
    plan: DecodePlan,
    bound: list[Tensor | None],
    ring: Ring,
    passages: Rows[Passage],
    step: int,
    scores: list[Tensor],
    device: torch.device,
) -> None:
    """Feed each row's next W tokens, and raise the scores of its chunk's keys."""
    fed = [passage.ids[step : step + plan.window] for passage in passages]
    padded = [[*ids, *[0] * (plan.window - len(ids))] for ids in fed]
    columns = [row.length + step for row in sequence.rows]
    first = [[column + row.offset] for column, row in zip(columns, sequence.rows, strict=True)]

    sites = plan.captured.sites

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor, full: Tensor) -> None:
        if sites[layer].window is not None:
            return  # a sliding layer is not compressed
        for b, (row, passage) in enumerate(zip(sequence.rows, passages, strict=True)):
            if not fed[b]:
                continue
            keys = full[b]
            sinks = keys[:, row.pad : min(row.pad + SINKS, passage.begin)]
            repeated = keys[:, row.length : columns[b] + len(fed[b])]
            drawn = most_attention(
                q[b, :, : len(fed[b])],
                sinks,
                keys[:, passage.begin : passage.end],
                repeated,
                sites[layer].scale,
            )
            held = scores[layer][b, :, passage.begin : passage.end]
            torch.maximum(held, drawn, out=held)

    tokens = torch.tensor(padded, device=device).t().unsqueeze(-1).contiguous()
    pads = [row.pad for row in sequence.rows]
    reaches = [site.window for site in sites]
    staging = sequence.staging(plan.captured.staging)
    coming = incoming(sequence.full, None, ring, staging, columns, pads, reaches)
    try:
        verify_tokens(coming, pads, plan, bound, tokens, torch.tensor(first, device=device), note)
    finally:
        coming.close()


def most_attention(q: Tensor, sinks: Tensor, chunk: Tensor, repeated: Tensor, scale: float) -> Tensor:
    """The most [K, S], float32, that one of q [H, n, D] pays to a key of the chunk [K, S, D].

    Each attends to sinks [K, s, D], the chunk, and causally to `repeated` [K, r, D], whose last n are their own.
    """
    kv_heads, tokens = chunk.shape[:2]
    rows = q.shape[1]
    folded = q.reshape(kv_heads, -1, q.shape[2]).float() * scale
    logits = torch.cat([folded @ keys.float().transpose(1, 2) for keys in (sinks, chunk, repeated)], dim=2)
    logits = logits.view(kv_heads, -1, rows, logits.shape[2])
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    logits[..., -rows:].masked_fill_(future, float("-inf"))
    weights = logits.softmax(dim=-1)
    return weights[..., sinks.shape[1] : sinks.shape[1] + tokens].amax(dim=(1, 2))
