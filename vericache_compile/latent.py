"""Multi-head latent attention (arXiv 2405.04434, section 2.1.2) as attention over one key that all heads share.

A weight [H * (N + E), R] makes of a cached latent c [R] each head's keys, U[h] [N, R], and values, V[h] [E, R]:

    q . [U[h] c, rotated]  =  [q[:N] U[h], q[N:]] . [c, rotated]           absorb
    sum of p * (V[h] c)    =  V[h] (sum of p * c)                          expand

So what is attended to is what is cached: keys [c, rotated] and values c. Shapes: B batch, H query heads, T tokens, N
numbers of a key that are not rotated, R those of a latent, E those of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vericache_compile.ops import heads_mm


def absorb(q: Tensor, weight: Tensor, rotated: int) -> Tensor:
    """Queries [B, H, T, N + rotated] as queries [B, H, T, R + rotated] for keys [latent, rotated part]."""
    size = q.shape[3] - rotated
    keys = weight.view(q.shape[1], -1, weight.shape[1])[:, :size]
    own = heads_mm(q[..., :size].transpose(1, 2), keys).transpose(1, 2)
    return torch.cat([own, q[..., size:]], dim=-1)


def expand(attended: Tensor, weight: Tensor, size: int) -> Tensor:
    """What attention gives of latents [B, H, T, R] as what it gives of values [B, H, T, E]; `size` is N."""
    values = weight.view(attended.shape[1], -1, weight.shape[1])[:, size:]
    made: Tensor = heads_mm(attended.transpose(1, 2), values.transpose(1, 2))
    return made.transpose(1, 2)
