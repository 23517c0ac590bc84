"""Attention whose scores are changed before the softmax: soft caps, ALiBi, attention sinks.

On the CPU the kernel does it, for other types than float32 and bfloat16 on copies in float32. Elsewhere, and where
there is no kernel, the same fixed blocks are worked on here, on the CPU with sums that do not depend on where a row
stands.

Shapes: B batch, H query heads, K KV heads, G = H / K, W window, C columns, D head size, E value head size, P places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.kernels import block_attention
from vericache_compile.kernels.block_attention import BLOCK, Scores
from vericache_compile.plan import Alibi, Site


def scores_of(site: Site, sinks: Tensor | None, places: int, device: torch.device) -> Scores | None:
    """What a site does to its scores, with biases for that many places; None where it only scales them."""
    if site.is_plain:
        return None
    assert (sinks is not None) == site.sinks, f"layer {site.layer} has sinks in its plan or in its graph, not in both"
    bias = None if site.alibi is None else alibi_bias(site.alibi, places, device)
    relative = site.alibi is not None and site.alibi.relative
    own = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
    return Scores(site.soft_cap, bias, relative, own)


def alibi_bias(alibi: Alibi, places: int, device: torch.device) -> Tensor:
    """Biases [H, places] (float32) by place, multiplied in the model's own type; relative places are 0, -1, ..."""
    slopes = torch.tensor(alibi.slopes, dtype=alibi.dtype, device=device)
    place = torch.arange(places, device=device) * (-1 if alibi.relative else 1)
    return (slopes[:, None] * place.to(alibi.dtype)).float()


def attend_scores(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    lefts: Sequence[Sequence[int]],
    scale: float,
    scores: Scores,
    reach: int | None = None,
) -> Tensor:
    """q [B, H, W, D] of tokens at columns starts[b] + (0..W-1), keys [B, K, C, D], values [B, K, C, E]; KV head k of
    row b sees columns from lefts[b][k] up to its own, and of these the last `reach` (None: all). Returns
    [B, H, W, E]."""
    end = max(starts) + q.shape[2]
    given = (q, keys[:, :, :end], values[:, :, :end])
    if not block_attention.serves(q):
        given = (given[0].float(), given[1].float(), given[2].float())
    if block_attention.serves(given[0]):
        return block_attention.attend(*given, starts, lefts, scale, scores, reach).to(q.dtype)
    rows = zip(*given, starts, lefts, strict=True)
    return torch.stack([_attend_row(*row, scale, scores, reach) for row in rows]).to(q.dtype)


def _attend_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    lefts: Sequence[int],
    scale: float,
    scores: Scores,
    reach: int | None,
) -> Tensor:
    """One row of the batch: q [H, W, D], keys [K, C, D], values [K, C, E] in float32, to [H, W, E]."""
    heads, window, size = q.shape
    groups = keys.shape[0]
    left = torch.tensor(lefts, device=q.device).repeat_interleave(heads // groups)[:, None, None]
    own = start + torch.arange(window, device=q.device)[:, None]
    outs, sums = [], []
    oldest = min(lefts) if reach is None else max(min(lefts), start + 1 - reach)
    for begin in range(oldest // BLOCK * BLOCK, start + window, BLOCK):
        k, v = (_block(x, begin) for x in (keys, values))
        column = torch.arange(begin, begin + BLOCK, device=q.device)
        raw = _products(q.reshape(groups, -1, size), k).view(heads, window, BLOCK) * scale
        changed = _change(raw, column - left, own - column, scores)
        hidden = (column > own) | (column < left)
        if reach is not None:
            hidden = hidden | (column <= own - reach)
        changed.masked_fill_(hidden, torch.finfo(torch.float32).min)
        total = torch.logsumexp(changed, dim=-1)
        shares = (changed - total.unsqueeze(-1)).exp().view(groups, -1, BLOCK)
        outs.append(_products(shares, v.transpose(1, 2)).view(heads, window, -1))
        sums.append(total)
    if scores.sinks is not None:
        outs.append(torch.zeros_like(outs[0]))
        sums.append(scores.sinks[:, None].expand(heads, window))
    return merge(torch.stack(outs), torch.stack(sums))


def _block(x: Tensor, begin: int) -> Tensor:
    """Columns [begin, begin + BLOCK) of x [K, C, *], filled up with zeros."""
    part = x[:, begin : begin + BLOCK]
    return torch.nn.functional.pad(part, (0, 0, 0, BLOCK - part.shape[1]))


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """rows [K, R, S] by columns [K, C, S], to [K, R, C]."""
    if rows.device.type == "cpu":  # libraries' products there are not the same for every place of a row
        return torch.stack([(row[:, None, :] * columns).sum(-1) for row in rows.unbind(1)], dim=1)
    return torch.matmul(rows, columns.transpose(1, 2))


def _change(raw: Tensor, place: Tensor, back: Tensor, scores: Scores) -> Tensor:
    """Scores [H, W, BLOCK], scaled, as the softmax reads them; places [H, 1, BLOCK] on, or [W, BLOCK] back."""
    if scores.soft_cap is not None:
        raw = torch.tanh(raw / scores.soft_cap) * scores.soft_cap
    if scores.bias is None:
        return raw
    index = (back if scores.relative else place).clamp(0, scores.bias.shape[1] - 1).expand(raw.shape)
    return raw + scores.bias.gather(1, index.flatten(1)).view(raw.shape)


def merge(out: Tensor, lse: Tensor) -> Tensor:
    """Blocks' outputs [N, K, R, E] and log-sum-exps [N, K, R] into [K, R, E], in block order."""
    share = (lse - lse.amax(dim=0)).exp_().unsqueeze(-1)
    total = share[0].clone()
    merged = out[0].to(share.dtype) * share[0]
    for i in range(1, out.shape[0]):
        merged.addcmul_(out[i].to(share.dtype), share[i])
        total += share[i]
    return merged.div_(total).to(out.dtype)
