"""Attention of a window over the full cache, in Triton: splits of 256 columns from column 0 on, merged in order.

A row's bits depend neither on its place in the window, nor on what else the window or the batch holds, nor on the
columns allocated. Lengths are tensors on the device, so nothing waits for the host and a CUDA graph can replay it.

Shapes: B batch, H query heads, K KV heads, G = H / K, W window, C columns, D head size, E value head size, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.kernels.launch import on, pad_size

SPLIT = 256
"""Columns that are attended together: the reference's BLOCK."""
PART = 32
"""Numbers of an output that a program merges: one program for them all would wait for each step's loads in turn."""
SHARED = 96 * 1024
"""Bytes of shared memory that a program may take: what every GPU since Ampere has (tests/kernels/test_compiled.py)."""


@dataclass(frozen=True)
class Parts:
    """What splits leave for the merge, per query row and split: softmax numerators, greatest scores and sums."""

    outs: Tensor
    """[B, H, W, S, E] float32."""
    tops: Tensor
    """[B, H, W, S] float32, in units of log 2."""
    totals: Tensor
    """[B, H, W, S] float32."""

    @classmethod
    def like(cls, q: Tensor, value_size: int, splits: int) -> Parts:
        """Room for the splits of queries [B, H, W, D]."""
        rows = (*q.shape[:3], splits)
        outs = torch.empty((*rows, value_size), dtype=torch.float32, device=q.device)
        return cls(outs, torch.empty_like(outs[..., 0]), torch.empty_like(outs[..., 0]))


def verify_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lefts: Tensor,
    scale: float,
    *,
    reach: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    relative: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """The token at place w of row b attends to columns lefts[b, k] .. starts[b] + w of KV head k; no other is read.

    q [B, H, W, D], keys [B, K, C, D], values [B, K, C, E], innermost stride 1; starts [B] and lefts [B, K] whole
    numbers on the device. `reach` lets a token see no more than so many columns, its own included; `soft_cap` makes
    scores cap * tanh(s / cap); `bias` [H, P] (float32) is then added by the key's place, counted on from lefts[b, k]
    or, `relative`, back from the token's own column; `sinks` [H] are scores that take part in the sum alone. Returns
    [B, H, W, E].
    """
    splits = -(-keys.shape[2] // SPLIT)
    parts = Parts.like(q, values.shape[3], splits)
    attend_splits(
        q, keys, values, starts, lefts, scale, parts, reach=reach, soft_cap=soft_cap, bias=bias, relative=relative
    )
    return merge_splits(q, parts, starts, lefts, keys.shape[1], reach=reach, sinks=sinks)


def attend_splits(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lefts: Tensor,
    scale: float,
    parts: Parts,
    *,
    skipped: int = 0,
    reach: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    relative: bool = False,
) -> None:
    """Fill `parts` from split `skipped` on; `lefts` count columns from the first split, `starts` from this buffer's."""
    from vericache_compile.kernels import verify_attention_triton as programs

    assert keys.stride(-1) == values.stride(-1) == 1, "numbers of a key, and of a value, lie side by side"
    if q.stride(-1) != 1:
        q = q.contiguous()
    batch, heads, window, size = q.shape
    kv_heads, columns, value_size = keys.shape[1], keys.shape[2], values.shape[3]
    group = heads // kv_heads
    rows, tile, stages = tile_sizes(group * window, max(size, value_size) * keys.element_size())
    with on(q):
        programs.attend_splits[(-(-columns // SPLIT), kv_heads * -(-group * window // rows), batch)](
            q, keys, values, starts, lefts, parts.totals if bias is None else bias,
            parts.outs, parts.tops, parts.totals, scale,
            kv_heads, parts.tops.shape[3], skipped, 0 if bias is None else bias.shape[1], *lefts.stride(),
            *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            GROUP=group, WINDOW=window, SIZE=size, VALUE=value_size, REACH=reach or 0, SOFT_CAP=soft_cap or 0.0,
            BIAS=bias is not None, RELATIVE=relative,
            ROWS=rows, SPLIT=SPLIT, TILE=tile, PAD_D=pad_size(size), PAD_E=pad_size(value_size),
            num_warps=4, num_stages=stages,
        )  # fmt: skip


def merge_splits(
    q: Tensor,
    parts: Parts,
    starts: Tensor,
    lefts: Tensor,
    kv_heads: int,
    *,
    skipped: int = 0,
    reach: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Outputs [B, H, W, E] in the type of q from what `attend_splits` left."""
    from vericache_compile.kernels import verify_attention_triton as programs

    batch, heads, window, splits, value_size = parts.outs.shape
    result = torch.empty((batch, heads, window, value_size), dtype=q.dtype, device=q.device)
    with on(q):
        programs.merge_splits[(batch * heads * window, -(-value_size // PART))](
            parts.outs, parts.tops, parts.totals, starts, lefts, parts.tops if sinks is None else sinks, result,
            kv_heads, splits, skipped, *lefts.stride(),
            GROUP=heads // kv_heads, WINDOW=window, VALUE=value_size, REACH=reach or 0,
            SINKS=sinks is not None, SPLIT=SPLIT, PART=PART, num_warps=1,
        )  # fmt: skip
    return result


def tile_sizes(rows: int, bytes_per_key: int) -> tuple[int, int, int]:
    """(query rows of a program, columns of a step, steps in flight), so that queries and these steps' keys and values
    fit in SHARED."""
    if bytes_per_key <= 256:
        return min(64, pad_size(rows)), 32, 3
    return (min(64, pad_size(rows)), 32, 2) if bytes_per_key <= 512 else (min(32, pad_size(rows)), 16, 2)


def verify_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lefts: Tensor,
    scale: float,
    *,
    reach: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    relative: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same by one masked softmax in float32, without blocks."""
    heads, window = q.shape[1:3]
    group = heads // keys.shape[1]
    column = torch.arange(keys.shape[2], device=q.device)
    own = starts.view(-1, 1, 1, 1) + torch.arange(window, device=q.device).view(1, 1, -1, 1)
    seen = (column <= own) & (column >= lefts.repeat_interleave(group, dim=1)[:, :, None, None])
    if reach is not None:
        seen &= column > own - reach
    shown = seen.any(dim=2).reshape(q.shape[0], -1, group, keys.shape[2]).any(dim=2)[..., None]
    k, v = (x.masked_fill(~shown, 0).float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = q.float() @ k.mT * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        place = own - column if relative else column - lefts.repeat_interleave(group, dim=1)[:, :, None, None]
        place = place.expand(scores.shape).clamp(0, bias.shape[1] - 1)
        scores = scores + bias.expand(len(q), -1, -1).gather(2, place.flatten(2)).view(scores.shape)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ v).to(q.dtype)
