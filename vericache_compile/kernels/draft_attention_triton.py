"""Triton program of `draft_attention`: attend to a packed region, dequantised as it is read.

Shapes: K KV heads, G query heads of one, S tokens of the region, g tokens in a group, D head size, E value head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vericache_compile.kernels.verify_attention_triton import absorb, keep_part, score


@triton.jit
def dequantise(
    codes, scale, zero, head, tokens, first, SIZE: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Float32 numbers of one side of a region, [TILE, PAD] or TURNED [PAD, TILE], from token `first` on.

    Codes lie as `compressors.quantizer.pack` lays them: a byte holds 8 / BITS tokens of a channel, GROUP * BITS / 8
    apart. CHANNELS share the scale of a token; 0: a group of tokens shares the scale of a channel.
    """
    BYTES: tl.constexpr = GROUP * BITS // 8
    if TURNED:
        token, channel = (first + tl.arange(0, TILE))[None, :], tl.arange(0, PAD)[:, None]
    else:
        token, channel = (first + tl.arange(0, TILE))[:, None], tl.arange(0, PAD)[None, :]
    mask = (token < tokens) & (channel < SIZE)
    place = token % GROUP
    held = head * (tokens * BITS // 8) + token // GROUP * BYTES + place % BYTES
    read = tl.load(codes + held * SIZE + channel, mask=mask, other=0)
    if BITS < 8:
        read = (read >> ((place // BYTES) * BITS).to(tl.uint8)) & ((1 << BITS) - 1)
    if WHOLE:
        made = read.to(tl.float32) * spread(scale, head, tokens, first, SIZE, TILE, GROUP, CHANNELS, TURNED)
        if ZERO:
            made += spread(zero, head, tokens, first, SIZE, TILE, GROUP, CHANNELS, TURNED)
    else:
        if CHANNELS > 0:
            at = (head * tokens + token) * (SIZE // CHANNELS) + channel // CHANNELS
        else:
            at = (head * (tokens // GROUP) + token // GROUP) * SIZE + channel
        made = read.to(tl.float32) * tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        if ZERO:
            made += tl.load(zero + at, mask=mask, other=0.0).to(tl.float32)
    return made


@triton.jit
def spread(
    x, head, tokens, first, SIZE: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Scales or zeros of a tile, each loaded once and repeated in registers: [TILE, SIZE], or TURNED [SIZE, TILE]."""
    if CHANNELS > 0:
        PARTS: tl.constexpr = SIZE // CHANNELS
        token, part = first + tl.arange(0, TILE), tl.arange(0, PARTS)
        if TURNED:
            at = (head * tokens + token)[None, :] * PARTS + part[:, None]
            held = tl.load(x + at, mask=(token < tokens)[None, :], other=0.0).to(tl.float32)
            made = tl.reshape(tl.broadcast_to(held[:, None, :], [PARTS, CHANNELS, TILE]), [SIZE, TILE])
        else:
            at = (head * tokens + token)[:, None] * PARTS + part[None, :]
            held = tl.load(x + at, mask=(token < tokens)[:, None], other=0.0).to(tl.float32)
            made = tl.reshape(tl.broadcast_to(held[:, :, None], [TILE, PARTS, CHANNELS]), [TILE, SIZE])
    else:
        SHARE: tl.constexpr = GROUP if GROUP < TILE else TILE
        group, channel = first // GROUP + tl.arange(0, TILE // SHARE), tl.arange(0, SIZE)
        row = head * (tokens // GROUP) + group
        real = group < tokens // GROUP
        if TURNED:
            held = tl.load(x + row[None, :] * SIZE + channel[:, None], mask=real[None, :], other=0.0).to(tl.float32)
            made = tl.reshape(tl.broadcast_to(held[:, :, None], [SIZE, TILE // SHARE, SHARE]), [SIZE, TILE])
        else:
            held = tl.load(x + row[:, None] * SIZE + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
            made = tl.reshape(tl.broadcast_to(held[:, None, :], [TILE // SHARE, SHARE, SIZE]), [TILE, SIZE])
    return made


@triton.jit
def attend_region(
    q, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, outs, tops, totals, scale, tokens, splits,
    first, q_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr, SOFT_CAP: tl.constexpr, BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_CHANNELS: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, PAD_D: tl.constexpr,
    PAD_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One split of one row's region for the G query heads of one KV head. Grid (splits of the region, K)."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    real = row < GROUP
    query_head = head * GROUP + row
    size = tl.arange(0, PAD_D)
    at = q + query_head * q_head
    queries = tl.load(at[:, None] + size[None, :], mask=real[:, None] & (size < SIZE)[None, :], other=0.0)
    out = tl.zeros([ROWS, PAD_E], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(0, tl.minimum(SPLIT, tokens - part * SPLIT), TILE):
        first_token = part * SPLIT + tile
        here = first_token + tl.arange(0, TILE) < tokens
        k = dequantise(
            key_codes, key_scale, key_zero, head, tokens, first_token, SIZE, PAD_D, TILE, BITS, KEY_GROUP,
            KEY_CHANNELS, ZERO, WHOLE, True,
        )  # fmt: skip
        v = dequantise(
            value_codes, value_scale, value_zero, head, tokens, first_token, VALUE, PAD_E, TILE, BITS, VALUE_GROUP,
            VALUE_CHANNELS, ZERO, WHOLE, False,
        )  # fmt: skip
        scores = score(queries, k.to(queries.dtype), scale, SOFT_CAP)
        scores = tl.where(here[None, :], scores, float("-inf"))
        out, top, total = absorb(out, top, total, scores, v.to(queries.dtype))
    keep_part(outs, tops, totals, out, top, total, query_head * splits + first + part, real, VALUE, PAD_E)
