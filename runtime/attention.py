"""Attention over the full cache in fixed blocks (verify), and over the compressed cache (draft).

Verify's bits must not depend on where a round starts: keys are taken in blocks of 256 columns anchored at column 0,
each block is attended on its own, and blocks are merged in order. A block that a row cannot see adds exactly zero.
In float32 and bfloat16 on the CPU that is a kernel of ours, and so it is on a GPU, in Triton, whatever the type. In
float16 on the CPU, and where no kernel could be built, it is torch's flash kernel. In 16-bit types flash chooses how to
multiply by the number of blocks it is given, so it gets them one by one; heads whose keys and values differ in size are
filled up with zeros, which change no sum (plain batched products are not invariant).

Shapes: B batch, H query heads, K KV heads, G = H / K, W window, D head size, E value head size, N blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.kernels import block_attention, launch
from vericache_compile.kernels.block_attention import BLOCK, Scores
from vericache_compile.kernels.verify_attention import verify_attention
from vericache_compile.ops import filled
from vericache_compile.runtime.scores import attend_scores
from vericache_compile.runtime.scores import merge as _merge


class Visible(NamedTuple):
    """The slots of a draft cache that each row's KV heads read: [lefts[b][k], rights[b])."""

    lefts: tuple[tuple[int, ...], ...]
    rights: tuple[int, ...]


def attend_full(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: list[int],
    pads: list[int],
    scale: float,
    reach: int | None = None,
    bounds: Tensor | None = None,
    scores: Scores | None = None,
    wanted: int | None = None,
) -> Tensor:
    """q [B, H, W, D] of tokens at columns starts[b] + (0..W-1), keys [B, K, C, D], values [B, K, C, E] (C a multiple of
    BLOCK, written up to starts[b] + W). Row b sees columns from pads[b] up to its own, and of these the last `reach`
    (a sliding window; None: all). `bounds` [2, B] is starts and pads on the device, where they are there already;
    `scores` says what is done to scores beside scaling them; of the W rows the first `wanted` are (None: all), see
    `ops.WANTED`. Returns [B, H, W, E]."""
    if launch.serves(q):
        begin, left = torch.tensor([starts, pads], device=q.device) if bounds is None else bounds
        how = {} if scores is None else scores._asdict()
        heads_left = left[:, None].expand(-1, keys.shape[1])
        return verify_attention(q, keys, values, begin, heads_left, scale, reach=reach, **how)
    lefts = [[pad] * keys.shape[1] for pad in pads]
    ours, window = block_attention.serves(q), q.shape[2]
    if ours and wanted is not None:
        q = q[:, :, :wanted]
    if scores is not None:
        return filled(attend_scores(q, keys, values, starts, lefts, scale, scores, reach), window, 2)
    if ours:
        return filled(block_attention.attend(q, keys, values, starts, lefts, scale, reach=reach), window, 2)
    out = q.new_empty((q.shape[0], q.shape[1], q.shape[2], values.shape[3]))
    for b, (start, pad) in enumerate(zip(starts, pads, strict=True)):
        out[b] = _attend_row(q[b], keys[b], values[b], start, pad, scale, reach)
    return out


def _attend_row(
    q: Tensor, keys: Tensor, values: Tensor, start: int, pad: int, scale: float, reach: int | None
) -> Tensor:
    heads, window, size = q.shape
    groups = keys.shape[0]
    folded = q.reshape(groups, heads // groups * window, size)
    oldest, newest = (pad if reach is None else max(pad, own + 1 - reach) for own in (start, start + window - 1))
    first, last = oldest // BLOCK, (start + window - 1) // BLOCK + 1
    plain_from, plain_to = -(-newest // BLOCK), (start + 1) // BLOCK
    parts: list[tuple[Tensor, Tensor]] = []
    for begin, end in ((first, min(plain_from, last)), (plain_from, plain_to), (max(plain_to, plain_from), last)):
        if begin < end:
            masked = end > plain_to or begin < plain_from
            mask = _window_mask(q, begin, end, start, pad, reach, heads // groups) if masked else None
            parts.append(_attend_blocks(folded, keys, values, begin, end, mask, scale))
    return _merge(torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts])).view(heads, window, -1)


def _window_mask(q: Tensor, begin: int, end: int, start: int, pad: int, reach: int | None, group: int) -> Tensor:
    """Additive mask [N, 1, G * W, BLOCK] for blocks begin..end: large but finite where hidden, so nothing is NaN."""
    window = q.shape[1]
    column = torch.arange(begin * BLOCK, end * BLOCK, device=q.device)
    own = start + torch.arange(window, device=q.device)
    hidden = (column > own[:, None]) | (column < pad)
    if reach is not None:
        hidden |= column <= own[:, None] - reach
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, torch.finfo(q.dtype).min)
    return (
        mask.view(1, window, end - begin, BLOCK)
        .expand(group, -1, -1, -1)
        .reshape(group * window, end - begin, BLOCK)
        .transpose(0, 1)
        .unsqueeze(1)
    )


def _attend_blocks(
    q: Tensor, keys: Tensor, values: Tensor, begin: int, end: int, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q [K, G * W, D] to each block on its own: outputs [N, K, G * W, E] and log-sum-exp [N, K, G * W]."""
    count = end - begin
    k, v = (
        x[:, begin * BLOCK : end * BLOCK].view(x.shape[0], count, BLOCK, x.shape[2]).transpose(0, 1)
        for x in (keys, values)
    )
    spread = q.unsqueeze(0).expand(count, *q.shape)
    if q.device.type == "cpu":
        size, value_size = k.shape[-1], v.shape[-1]
        if size != value_size:
            spread, k, v = (F.pad(x, (0, max(size, value_size) - x.shape[-1])) for x in (spread, k, v))
        if mask is not None:
            mask = mask.expand(count, q.shape[0], -1, -1)
        step = count if q.dtype is torch.float32 else 1
        parts = [_flash(spread, k, v, mask, slice(i, i + step), scale) for i in range(0, count, step)]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
        return out[..., :value_size], lse
    scores = torch.matmul(spread, k.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp().to(v.dtype), v), lse


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, blocks: slice, scale: float) -> tuple[Tensor, Tensor]:
    own = None if mask is None else mask[blocks]
    made: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[blocks], k[blocks], v[blocks], attn_mask=own, scale=scale
    )
    return made


def attend_compressed(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Visible,
    scale: float,
    masks: dict[Visible, Tensor | None],
    scores: Scores | None = None,
) -> Tensor:
    """One token per row over its compressed cache: q [B, H, 1, D], keys [B, K, S, D], values [B, K, S, E]; row b reads
    its visible slots. `masks` keeps what layers share, `scores` as for `attend_full`. Returns [B, H, 1, E]."""
    if scores is not None:
        return attend_scores(q, keys, values, [end - 1 for end in visible.rights], visible.lefts, scale, scores)
    if block_attention.serves(q):
        return block_attention.attend(q, keys, values, [end - 1 for end in visible.rights], visible.lefts, scale)
    if visible not in masks:
        masks[visible] = _slot_mask(visible, keys)
    longest = max(visible.rights)
    batch, heads, _, size = q.shape
    groups = keys.shape[1]
    folded = q.reshape(batch, groups, heads // groups, size)  # the group as query rows, so K/V are read once
    out = F.scaled_dot_product_attention(
        folded, keys[:, :, :longest], values[:, :, :longest], attn_mask=masks[visible], scale=scale
    )
    return out.reshape(batch, heads, 1, values.shape[3])


def _slot_mask(visible: Visible, keys: Tensor) -> Tensor | None:
    """Additive mask [B, 1 or K, 1, S] over the slots up to the last that is read; None where all read the same."""
    if not any(map(any, visible.lefts)) and len(set(visible.rights)) == 1:
        return None
    same = all(len(set(row)) == 1 for row in visible.lefts)
    lefts = [row[:1] if same else row for row in visible.lefts]
    slot = torch.arange(max(visible.rights), device=keys.device)
    left = torch.tensor(lefts, device=keys.device)[:, :, None]
    right = torch.tensor(visible.rights, device=keys.device)[:, None, None]
    hidden = (slot < left) | (slot >= right)
    mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, :, None, :]
