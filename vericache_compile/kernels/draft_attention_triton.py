"""Triton program of `draft_attention`: attend to a packed region, dequantised as it is read.

Shapes: K KV heads, G query heads of one, D head size, E value head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vericache_compile.kernels.verify_attention_triton import absorb, keep_part, score


@triton.jit
def rows_and_channels(
    first, SIZE: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, BYTES: tl.constexpr, CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Which rows of bytes, and which channels, a tile holds; both have three axes, of which together TILE * PAD.

    Axes are those along which scales are shared: [row, part, channel of it] where CHANNELS share the scale of a token,
    [group, row of it, channel] where a group of tokens does; [row, 1, channel] where sizes are no powers of two.
    """
    if WHOLE:
        if CHANNELS > 0:
            row = first + tl.arange(0, TILE)[:, None, None]
            part = tl.arange(0, SIZE // CHANNELS)[None, :, None]
            channel = part * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
        else:
            SHARE: tl.constexpr = BYTES if BYTES < TILE else TILE
            group = tl.arange(0, TILE // SHARE)[:, None, None]
            row = first + group * SHARE + tl.arange(0, SHARE)[None, :, None]
            channel = tl.arange(0, SIZE)[None, None, :]
    else:
        row = first + tl.arange(0, TILE)[:, None, None]
        channel = tl.arange(0, PAD)[None, None, :]
    return row, channel


@triton.jit
def read_shared(
    x, head, tokens, room, first, bits, SIZE: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    BYTES: tl.constexpr, CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scales or zeros of the tokens that lie `bits` along in the bytes of a tile, on its axes; float32."""
    row, channel = rows_and_channels(first, SIZE, PAD, TILE, BYTES, CHANNELS, WHOLE)
    if CHANNELS > 0:
        PARTS: tl.constexpr = SIZE // CHANNELS
        token = row // BYTES * GROUP + bits * BYTES + row % BYTES
        part = tl.arange(0, PARTS)[None, :, None] if WHOLE else channel // CHANNELS
        at, mask = (head * room + token) * PARTS + part, (token < tokens) & (part < PARTS)
    else:
        if WHOLE:
            SHARE: tl.constexpr = BYTES if BYTES < TILE else TILE
            group = first // BYTES + tl.arange(0, TILE // SHARE)[:, None, None]
        else:
            group = row // BYTES
        at = (head * (room // GROUP) + group) * SIZE + channel
        mask = (group < tokens // GROUP) & (channel < SIZE)
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def read_bytes(
    codes, head, rows, room, first, SIZE: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, BYTES: tl.constexpr,
    CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """TILE rows of bytes of one side of a region, which has `room` for more than `rows`, on the axes of
    `rows_and_channels`.

    Codes lie as `compressors.quantizer.pack` lays them: BYTES rows for each GROUP of tokens; a byte holds 8 / BITS
    tokens of a channel, BYTES apart.
    """
    row, channel = rows_and_channels(first, SIZE, PAD, TILE, BYTES, CHANNELS, WHOLE)
    return tl.load(codes + (head * room + row) * SIZE + channel, mask=(row < rows) & (channel < SIZE), other=0)


@triton.jit
def dequantise(
    read, scale, zero, head, tokens, room, first, bits: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    TILE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr, CHANNELS: tl.constexpr,
    ZERO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Float32 numbers [TILE, PAD] of those tokens that lie `bits` along in the bytes of a tile."""
    if BITS < 8:
        read = (read >> (bits * BITS)) & ((1 << BITS) - 1)
    made = read.to(tl.float32) * read_shared(
        scale, head, tokens, room, first, bits, SIZE, PAD, TILE, GROUP, BYTES, CHANNELS, WHOLE
    )
    if ZERO:
        made += read_shared(zero, head, tokens, room, first, bits, SIZE, PAD, TILE, GROUP, BYTES, CHANNELS, WHOLE)
    return tl.reshape(made, [TILE, PAD])


@triton.jit
def attend_region(
    q, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, outs, tops, totals, scale, covered, room,
    splits, end, q_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr, SOFT_CAP: tl.constexpr, BITS: tl.constexpr,
    PACKED: tl.constexpr, KEY_CHANNELS: tl.constexpr, VALUE_CHANNELS: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One split of one row's region for the G query heads of one KV head. Grid (splits that it has room for, K).

    A split is as many rows of bytes as SPLIT tokens take, and a tile TILE of them; PACKED tokens are packed together.
    Its tokens are counted on the device; the split of the last of them is the one before split `end`.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = PACKED // PER_BYTE
    part = tl.program_id(0)
    tokens = tl.load(covered).to(tl.int32)
    if part * SPLIT < tokens:
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
        rows, room_rows = tokens // PER_BYTE, room // PER_BYTE
        begin = part * (SPLIT // PER_BYTE)
        for tile in range(begin, tl.minimum(begin + SPLIT // PER_BYTE, rows), TILE):
            here = tile + tl.arange(0, TILE) < rows
            k_read = read_bytes(key_codes, head, rows, room_rows, tile, SIZE, PAD_D, TILE, BYTES, KEY_CHANNELS, WHOLE)
            v_read = read_bytes(
                value_codes, head, rows, room_rows, tile, VALUE, PAD_E, TILE, BYTES, VALUE_CHANNELS, WHOLE
            )
            for bits in tl.static_range(PER_BYTE):
                k = dequantise(
                    k_read, key_scale, key_zero, head, tokens, room, tile, bits, SIZE, PAD_D, TILE, BITS, PACKED, BYTES,
                    KEY_CHANNELS, ZERO, WHOLE,
                )  # fmt: skip
                v = dequantise(
                    v_read, value_scale, value_zero, head, tokens, room, tile, bits, VALUE, PAD_E, TILE, BITS, PACKED,
                    BYTES, VALUE_CHANNELS, ZERO, WHOLE,
                )  # fmt: skip
                scores = score(queries, tl.trans(k.to(queries.dtype)), scale, SOFT_CAP)
                scores = tl.where(here[None, :], scores, float("-inf"))
                out, top, total = absorb(out, top, total, scores, v.to(queries.dtype))
        at_row = query_head * splits + end - (tokens + SPLIT - 1) // SPLIT + part
        keep_part(outs, tops, totals, out, top, total, at_row, real, VALUE, PAD_E)
