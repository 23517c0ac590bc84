"""Triton programs of `verify_attention`: attend to each split of columns on its own, then merge splits in order.

Columns are counted over a region and the buffer behind it (`skipped` splits are the region's; none for a full cache).
Whatever a row may not see adds exactly zero, whether or not it is computed, and every tile has a fixed shape: a row's
bits are a function of its query and of the columns that it sees. This file alone imports triton; launches import it.

B batch, H query heads, K KV heads, G = H / K, W window, D head size, E value head size, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

MERGED = tl.constexpr(64)  # splits that are merged in one step


@triton.jit
def score(q, k, scale, SOFT_CAP: tl.constexpr):
    """Scores [R, N] in units of log 2, of queries [R, D] and keys [D, N]."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFT_CAP > 0:  # cap * tanh(s / cap)
        turned = tl.exp2(tl.abs(scores) * (-2.8853900817779268 / SOFT_CAP))
        size = SOFT_CAP * (1 - turned) / (1 + turned)
        scores = tl.where(scores < 0, -size, size)
    return scores * 1.4426950408889634


@triton.jit
def absorb(out, top, total, scores, v):
    """Take N more columns into a running softmax: out [R, E], top and total [R], scores [R, N], values [N, E]."""
    new = tl.maximum(top, tl.max(scores, 1))
    held = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: every weight is exactly 0
    kept = tl.exp2(top - held)
    weights = tl.exp2(scores - held[:, None])
    total = total * kept + tl.sum(weights, 1)
    more = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return out * kept[:, None] + more, new, total


@triton.jit
def keep_part(outs, tops, totals, out, top, total, row, real, VALUE: tl.constexpr, PAD_E: tl.constexpr):
    """Store a split's out [R, E], top and total [R] at places `row` [R] of the workspaces."""
    value = tl.arange(0, PAD_E)
    tl.store(tops + row, top, mask=real)
    tl.store(totals + row, total, mask=real)
    tl.store(outs + row[:, None] * VALUE + value[None, :], out, mask=real[:, None] & (value < VALUE)[None, :])


@triton.jit
def attend_splits(
    q, keys, values, starts, lefts, bias, outs, tops, totals, scale, kv_heads, splits, skipped, places, l_batch, l_head,
    q_batch, q_head, q_row, k_batch, k_head, k_column, v_batch, v_head, v_column,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr,
    REACH: tl.constexpr, SOFT_CAP: tl.constexpr, BIAS: tl.constexpr, RELATIVE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
):  # fmt: skip
    """One split of the buffer for ROWS of the G * W query rows of one KV head of one row of the batch.

    Grid (splits of the buffer, K * tiles of rows, B). Lengths are read here, on the device.
    """
    TILES: tl.constexpr = (GROUP * WINDOW + ROWS - 1) // ROWS
    part = tl.program_id(0)
    head = (tl.program_id(1) // TILES).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    begin = (part + skipped) * SPLIT
    start = tl.load(starts + batch).to(tl.int32) + skipped * SPLIT
    left = tl.load(lefts + batch * l_batch + head * l_head).to(tl.int32)
    lowest = left
    if REACH > 0:
        lowest = tl.maximum(left, start - REACH + 1)
    if (begin < start + WINDOW) & (begin + SPLIT > lowest):
        row = (tl.program_id(1) % TILES) * ROWS + tl.arange(0, ROWS)
        real = row < GROUP * WINDOW
        place = row % WINDOW
        query_head = head * GROUP + row // WINDOW
        own = start + place
        first = tl.zeros([ROWS], tl.int32) + left
        if REACH > 0:
            first = tl.maximum(first, own - REACH + 1)
        size, value = tl.arange(0, PAD_D), tl.arange(0, PAD_E)
        at = q + batch * q_batch + query_head * q_head + place * q_row
        queries = tl.load(at[:, None] + size[None, :], mask=real[:, None] & (size < SIZE)[None, :], other=0.0)
        out = tl.zeros([ROWS, PAD_E], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for tile in range(0, SPLIT, TILE):
            offset = part * SPLIT + tile + tl.arange(0, TILE)
            column = offset + skipped * SPLIT
            written = (column < start + WINDOW) & (column >= lowest)
            k_at = keys + batch * k_batch + head * k_head + offset.to(tl.int64) * k_column
            k = tl.load(k_at[None, :] + size[:, None], mask=written[None, :] & (size < SIZE)[:, None], other=0.0)
            v_at = values + batch * v_batch + head * v_head + offset.to(tl.int64) * v_column
            v = tl.load(v_at[:, None] + value[None, :], mask=written[:, None] & (value < VALUE)[None, :], other=0.0)
            seen = (column[None, :] >= first[:, None]) & (column[None, :] <= own[:, None])
            scores = score(queries, k, scale, SOFT_CAP)
            if BIAS:
                there = own[:, None] - column[None, :] if RELATIVE else column[None, :] - left
                held = seen & real[:, None] & (there < places)
                read = tl.load(bias + query_head[:, None] * places + there, mask=held, other=0.0)
                scores += read * 1.4426950408889634
            scores = tl.where(seen, scores, float("-inf"))
            out, top, total = absorb(out, top, total, scores, v)
        at_row = ((batch * kv_heads * GROUP + query_head) * WINDOW + place) * splits + part + skipped
        keep_part(outs, tops, totals, out, top, total, at_row, real, VALUE, PAD_E)


@triton.jit(do_not_specialize=["splits"])  # else the order of sums would follow what divides the number of splits
def merge_splits(
    outs, tops, totals, starts, lefts, sinks, result, kv_heads, splits, skipped, l_batch, l_head,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, VALUE: tl.constexpr, REACH: tl.constexpr,
    SINKS: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The splits that one query row sees, in order, into PART numbers of its output. Result [B, H, W, E].

    Grid (B * H * W, ceil(E / PART)).
    """
    row = tl.program_id(0).to(tl.int64)
    query_head = (row // WINDOW) % (kv_heads * GROUP)
    batch = row // (WINDOW * kv_heads * GROUP)
    own = tl.load(starts + batch).to(tl.int32) + skipped * SPLIT + (row % WINDOW).to(tl.int32)
    left = tl.load(lefts + batch * l_batch + query_head // GROUP * l_head).to(tl.int32)
    if REACH > 0:
        left = tl.maximum(left, own - REACH + 1)
    first, last = left // SPLIT, own // SPLIT
    value = tl.program_id(1) * PART + tl.arange(0, PART)
    out = tl.zeros([PART], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SINKS:  # a score that takes its share and gives no value
        top = tl.zeros([1], tl.float32) + tl.load(sinks + query_head).to(tl.float32) * 1.4426950408889634
        total = tl.full([1], 1.0, tl.float32)
    for step in range(first // MERGED, last // MERGED + 1):
        part = step * MERGED + tl.arange(0, MERGED)
        real = (part >= first) & (part <= last)
        at = row * splits + part
        tops_here = tl.load(tops + at, mask=real, other=float("-inf"))
        new = tl.maximum(top, tl.max(tops_here, 0))
        held = tl.where(new == float("-inf"), 0.0, new)
        kept, share = tl.exp2(top - held), tl.exp2(tops_here - held)
        more = tl.load(
            outs + at[:, None] * VALUE + value[None, :], mask=real[:, None] & (value < VALUE)[None, :], other=0.0
        )
        total = total * kept + tl.sum(tl.load(totals + at, mask=real, other=0.0) * share, 0)
        out = out * kept + tl.sum(more * share[:, None], 0)
        top = new
    done = (out / total).to(result.dtype.element_ty)
    tl.store(result + row * VALUE + value, done, mask=value < VALUE)
