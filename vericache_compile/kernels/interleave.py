"""Tokens that lie in two buffers, each in their order, put into one in the order of the cache; in one pass, in Triton.

Shapes: K KV heads, S tokens, N slots of the fullest head, M tokens left out by the emptiest, D head size, E value head
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.kernels.launch import on, pad_size

BLOCK = 64
"""Tokens of one program."""
CHUNK = 128
"""Numbers of each token that it moves at a time."""


def count_before(held: Tensor) -> Tensor:
    """Of each BLOCK of tokens of held [K, S], how many of those before it are held: [K, ceil(S / BLOCK)], int32."""
    padded = torch.nn.functional.pad(held, (0, -held.shape[1] % BLOCK))
    counts = padded.view(held.shape[0], -1, BLOCK).sum(dim=2, dtype=torch.int32)
    return counts.cumsum(dim=1, dtype=torch.int32) - counts


def interleave(
    targets: Sequence[Tensor],
    kept: Sequence[Tensor],
    left: Sequence[Tensor],
    held: Tensor,
    before: Tensor,
    firsts: Tensor,
) -> None:
    """Write targets [K, S, *]: where held [K, S] the next token of kept [K, N, *], elsewhere that of left [K, M, *].

    Keys, and values where there are any: one or two of each. firsts [2, K, 1] (int64): where in left, and in kept, a
    head's own tokens begin; before is `count_before(held)`. In targets and left tokens lie side by side.
    """
    from vericache_compile.kernels import interleave_triton as programs

    kept = [x if _is_packed(x) else x.contiguous() for x in kept]
    assert all(map(_is_packed, (*targets, *left))), "a token's numbers lie side by side, and so do tokens"
    heads, tokens = held.shape
    size, value = targets[0].shape[2], targets[1].shape[2] if len(targets) > 1 else 0
    buffers = [side for group in (targets, kept, left) for side in (group[0], group[-1])]
    with on(held):
        programs.interleave[(before.shape[1], heads)](
            *buffers, held, before, firsts, tokens, before.shape[1], heads, *(x.stride(0) for x in buffers),
            SIZE=size, VALUE=value, BLOCK=BLOCK, CHUNK=min(pad_size(max(size, value)), CHUNK),
        )  # fmt: skip


def interleave_reference(
    targets: Sequence[Tensor], kept: Sequence[Tensor], left: Sequence[Tensor], held: Tensor, firsts: Tensor
) -> None:
    """The same by torch's operators: both buffers side by side, then each token from its place there."""
    so_far = held.cumsum(dim=1)
    others = torch.arange(held.shape[1], device=held.device) - so_far
    for target, own, rest in zip(targets, kept, left, strict=True):
        order = torch.where(held, rest.shape[1] + firsts[1] + so_far - 1, firsts[0] + others)
        target.copy_(take(torch.cat([rest, own], dim=1), order))


def _is_packed(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [K, n] of x [K, T, D]: [K, n, D]. As rows of a matrix, which on a CPU is five times as fast."""
    heads, count, size = x.shape
    if x.stride(2) != 1 or x.stride(0) % size or x.stride(1) % size:
        x = x.contiguous()
    per_head, per_token = x.stride(0) // size, x.stride(1) // size
    rows = tokens * per_token + torch.arange(heads, device=x.device)[:, None] * per_head
    matrix = x.as_strided(((heads - 1) * per_head + (count - 1) * per_token + 1, size), (size, 1))
    return matrix.index_select(0, rows.flatten()).view(*tokens.shape, size)
