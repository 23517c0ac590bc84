"""Attention of one token per row over its compressed cache, in Triton: [compressed region | exact tail].

Dense regions lie in the buffer of the tail: they are columns like the tail's. Packed ones are read as codes and
dequantised on the way, so the bytes that a step moves are those that are kept. Splits are attended on their own and
merged; lengths are tensors on the device, so that a CUDA graph of a step can be replayed while tails grow.

Shapes: B batch, H query heads, K KV heads, S slots, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.compressors.packed import PackedSide
from vericache_compile.compressors.quantizer import unpack
from vericache_compile.kernels.launch import on, pad_size
from vericache_compile.kernels.verify_attention import (
    SPLIT,
    Parts,
    attend_splits,
    merge_splits,
    verify_attention,
    verify_attention_reference,
)

Region = tuple[PackedSide, PackedSide]
"""Keys and values of one row's packed region."""


def draft_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    lefts: Tensor,
    scale: float,
    regions: Sequence[Region] = (),
    covered: Tensor | None = None,
    *,
    reach: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    relative: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, H, 1, D] over keys [B, K, S, D] and values [B, K, S, E]: row b reads slots lefts[b, k] .. newest[b].

    newest [B] and lefts [B, K] are on the device. With packed `regions`, one a row, row b reads the first covered[b]
    tokens of its own first, then slots 0 .. newest[b]: lefts must then be `region_lefts(regions, K)`, `covered` [B]
    int64 their tokens, on the device too, `reach` and `bias` None. Launches depend on the room that regions have, not
    on their tokens. Returns [B, H, 1, E].
    """
    if not regions:
        return verify_attention(
            q, keys, values, newest, lefts, scale,
            reach=reach, soft_cap=soft_cap, bias=bias, relative=relative, sinks=sinks,
        )  # fmt: skip
    assert reach is None and bias is None, "slots of packed regions are no columns, by which these count"
    assert covered is not None, "regions are read as far as they are filled"
    skipped = splits_for(regions)
    parts = Parts.like(q, values.shape[3], skipped - (-keys.shape[2] // SPLIT))
    for b, region in enumerate(regions):
        _attend_region(q[b], region, covered[b:], parts, b, skipped, scale, soft_cap)
    attend_splits(q, keys, values, newest, lefts, scale, parts, skipped=skipped, soft_cap=soft_cap)
    return merge_splits(q, parts, newest, lefts, keys.shape[1], skipped=skipped, sinks=sinks)


def splits_for(regions: Sequence[Region]) -> int:
    """Splits before the tail: as many as the largest region has room for."""
    return max(-(-keys.room // SPLIT) for keys, _ in regions)


def region_lefts(regions: Sequence[Region], kv_heads: int) -> list[list[int]]:
    """The first column [B][K] of each row: regions end where their room ends, in whole splits."""
    filled = [-(-keys.tokens // SPLIT) for keys, _ in regions]
    return [[(splits_for(regions) - each) * SPLIT] * kv_heads for each in filled]


def _attend_region(
    q: Tensor,
    region: Region,
    covered: Tensor,
    parts: Parts,
    row: int,
    skipped: int,
    scale: float,
    soft_cap: float | None,
) -> None:
    """q [H, 1, D] of one row over the first `covered` [1] tokens of its region, into the last splits of `parts` before
    `skipped`."""
    from vericache_compile.kernels import draft_attention_triton as programs

    keys, values = region
    if not keys.room:
        return
    assert (keys.bits, keys.group) == (values.bits, values.group), "a byte of keys and one of values hold other tokens"
    if q.stride(-1) != 1:
        q = q.contiguous()
    kv_heads = keys.codes.shape[0]
    group = q.shape[0] // kv_heads
    tile, stages = region_tile(keys.bits, max(keys.size, values.size) * q.element_size())
    with on(q):
        programs.attend_region[(-(-keys.room // SPLIT), kv_heads)](
            q, keys.codes, keys.scale, keys.zero_or_scale, values.codes, values.scale, values.zero_or_scale,
            parts.outs[row], parts.tops[row], parts.totals[row], scale, covered,
            keys.room, parts.tops.shape[3], skipped, q.stride(0),
            GROUP=group, SIZE=keys.size, VALUE=values.size, SOFT_CAP=soft_cap or 0.0, BITS=keys.bits,
            PACKED=keys.group, KEY_CHANNELS=keys.channels, VALUE_CHANNELS=values.channels,
            ZERO=keys.zero is not None, ROWS=pad_size(group), SPLIT=SPLIT, TILE=tile,
            PAD_D=pad_size(keys.size), PAD_E=pad_size(values.size), WHOLE=is_whole(keys) and is_whole(values),
            num_warps=2, num_stages=stages,
        )  # fmt: skip


def is_whole(side: PackedSide) -> bool:
    """Whether tiles are made of whole groups, so that a scale is loaded once for all that share it in a tile."""
    powers = all(count & (count - 1) == 0 for count in (side.size, side.group, side.channels))
    return powers and side.size == pad_size(side.size)


def region_tile(bits: int, bytes_per_key: int) -> tuple[int, int]:
    """(rows of bytes of a step, steps in flight), so that a program fits in memory (tests/kernels/test_compiled.py)."""
    return 32 if bits == 8 and bytes_per_key <= 256 else 16, 2 if bytes_per_key <= 512 else 1


def dequantise_reference(side: PackedSide) -> Tensor:
    """Float32 numbers [K, S, D] of the tokens that one side of a region holds."""
    codes = side.codes if side.bits == 8 else unpack(side.codes, side.bits)
    numbers = codes.float().reshape(codes.shape[0], side.room, side.size)
    shared = (1, side.channels) if side.channels else (side.group, 1)

    def spread(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(shared[0], dim=1).repeat_interleave(shared[1], dim=2)

    made: Tensor = numbers * spread(side.scale) + (0 if side.zero is None else spread(side.zero))
    return made[:, : side.tokens]


def draft_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    lefts: Tensor,
    scale: float,
    regions: Sequence[Region] = (),
    covered: Tensor | None = None,
    *,
    reach: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    relative: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same by dequantising regions and one masked softmax in float32, row by row."""
    outs = []
    for b in range(q.shape[0]):
        own_keys, own_values, left, before = keys[b], values[b], lefts[b : b + 1], 0
        if regions:
            before = regions[b][0].tokens
            assert covered is not None
            assert before == int(covered[b])
            own_keys, own_values = (
                torch.cat([dequantise_reference(side).to(q.dtype), held], dim=1)
                for side, held in zip(regions[b], (own_keys, own_values), strict=True)
            )
            left = torch.zeros_like(left)
        outs.append(
            verify_attention_reference(
                q[b : b + 1],
                own_keys[None],
                own_values[None],
                newest[b : b + 1] + before,
                left,
                scale,
                reach=reach,
                soft_cap=soft_cap,
                bias=bias,
                relative=relative,
                sinks=sinks,
            )
        )
    return torch.cat(outs)
